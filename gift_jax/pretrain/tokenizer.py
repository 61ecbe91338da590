# SPDX-License-Identifier: Apache-2.0
"""A small CLIP tokenizer: every word of the captions is one token, any text is valid.

Same algorithm and file format as CLIP's (byte-level BPE with an end-of-word mark), so
`transformers.CLIPTokenizer` reads it; only the merges are learned from our captions.
"""

import json
import pathlib
from collections.abc import Iterable

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

START, END = "<|startoftext|>", "<|endoftext|>"
END_OF_WORD = "</w>"


def write(folder: pathlib.Path, captions: Iterable[str], max_length: int) -> int:
    """Writes the tokenizer's files; returns the size of its vocabulary.

    Args: captions: text whose words become single tokens. max_length: prompts are
      padded and cut to this many tokens, the two marks included.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = _learn_merges(captions)
    words = alphabet + [byte + END_OF_WORD for byte in alphabet]
    words += ["".join(pair) for pair in merges] + [START, END]
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys(words))}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False))
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n")
    settings = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": max_length,
        "do_lower_case": True,
        "add_prefix_space": False,
        "errors": "replace",
        "bos_token": START,
        "eos_token": END,
        "unk_token": END,
        "pad_token": END,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))
    marks = {k: settings[k] for k in settings if k.endswith("_token")}
    (folder / "special_tokens_map.json").write_text(json.dumps(marks, indent=1))
    return len(vocabulary)


def _learn_merges(captions: Iterable[str]) -> list[tuple[str, str]]:
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix=END_OF_WORD))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.Digits(individual_digits=True)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=49_000,
        min_frequency=1,
        end_of_word_suffix=END_OF_WORD,
        show_progress=False,
    )
    tokenizer.train_from_iterator(captions, trainer)
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    return [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in merges]
