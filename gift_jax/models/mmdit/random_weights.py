# SPDX-License-Identifier: Apache-2.0
"""Writes a Stable Diffusion 3 of a published shape with random weights; no download.

As `sd.random_weights` does. T5's tokenizer has placeholders for words, too.
"""

import pathlib

from gift_jax.models.mmdit import architectures
from gift_jax.models.mmdit.components import KIND_OF
from gift_jax.models.sd import random_weights
from gift_jax.runtime import files
from gift_jax.runtime.errors import UserError

T5_MARKS = ("<pad>", "</s>", "<unk>")
_SPACE = "\u2581"
_EXTRA = 100  # tokens that stand for gaps, last in the vocabulary


def write(out, configs: dict, dtype: str = "float32", seed: int = 0, shard_mib=0):
    """Writes a whole model folder, one tensor in memory at a time.

    Args: out: must not exist. configs: one of `architectures.MODELS`, or one like it,
      maybe without text_encoder_3. dtype, seed, shard_mib: see
      `sd.random_weights.write`.
    Returns: the folder.
    Raises: UserError if `out` exists.
    """
    out = pathlib.Path(out)
    if out.exists():
        raise UserError(f"--out={out} exists; name a new folder")
    index = architectures.model_index(configs["scheduler"]["_class_name"])
    with files.atomic_folder(out) as temp:
        for name, kind in KIND_OF.items():
            if name in configs:
                args = configs[name], dtype, seed, shard_mib
                random_weights.write_component(temp / name, kind, *args)
        text = configs["text_encoder"]
        size, length = text["vocab_size"], text["max_position_embeddings"]
        for number in ("", "_2"):
            pad = configs[f"pad_token{number}"]
            folder = temp / f"tokenizer{number}"
            random_weights.write_tokenizer(folder, size, length, pad)
        if "text_encoder_3" in configs:
            size = configs["text_encoder_3"]["vocab_size"]
            write_t5_tokenizer(temp / "tokenizer_3", size)
        else:
            index |= {key: [None, None] for key in ("text_encoder_3", "tokenizer_3")}
        scheduler = temp / "scheduler" / "scheduler_config.json"
        random_weights.write_json(scheduler, configs["scheduler"])
        random_weights.write_json(temp / "model_index.json", index)
    return out


def write_t5_tokenizer(directory, size: int = 300) -> None:
    """Writes a T5 tokenizer of `size` entries that knows the characters of ASCII.

    The marks have the published ids; between lie placeholders that no text becomes.
    """
    letters = [chr(code) for code in range(33, 127)]
    words = [(mark, 0.0) for mark in T5_MARKS]
    words += [(letter, -5.0) for letter in (_SPACE, *letters)]
    words += [(_SPACE + letter, -4.0) for letter in letters]
    count = size - _EXTRA - len(words)
    words += [(f"<placeholder {i}>", -100.0) for i in range(count)]
    words += [(f"<extra_id_{i}>", 0.0) for i in reversed(range(_EXTRA))]
    metaspace = {
        "type": "Metaspace",
        "replacement": _SPACE,
        "prepend_scheme": "always",
        "split": True,
    }
    end = {"SpecialToken": {"id": T5_MARKS[1], "type_id": 0}}
    first, second = ({"Sequence": {"id": name, "type_id": 0}} for name in ("A", "B"))
    extra = [
        (i, word) for i, (word, _) in enumerate(words) if word.startswith("<extra")
    ]
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            _added_token(i, word) for i, word in [*enumerate(T5_MARKS), *extra]
        ],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [{"type": "WhitespaceSplit"}, metaspace],
        },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [first, end],
            "pair": [first, end, second, end],
            "special_tokens": {
                T5_MARKS[1]: {"id": T5_MARKS[1], "ids": [1], "tokens": [T5_MARKS[1]]}
            },
        },
        "decoder": metaspace,
        "model": {
            "type": "Unigram",
            "unk_id": 2,
            "vocab": words,
            "byte_fallback": False,
        },
    }
    settings = dict(zip(("pad_token", "eos_token", "unk_token"), T5_MARKS, strict=True))
    settings |= {"tokenizer_class": "T5Tokenizer", "model_max_length": 512}
    random_weights.write_json(directory / "tokenizer.json", content)
    random_weights.write_json(directory / "tokenizer_config.json", settings)


def _added_token(i, word):
    rule = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": i, "content": word, "special": True, **rule}
