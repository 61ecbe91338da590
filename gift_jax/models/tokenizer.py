# SPDX-License-Identifier: Apache-2.0
"""A model folder's tokenizer: the one thing that transformers is used for.

It is the fast one, which today's pipelines use. The slow one of transformers 4 puts
spaces around every Chinese and Japanese character, which gives other ids.
"""

import json
from pathlib import Path
from typing import Any

from gift_jax.runtime import damage
from gift_jax.runtime.errors import LARGEST, UserError, one_line, parse_json, shown

_END_OF_WORD = "</w>"
_HEADER = "#version"  # of merges.txt, which is no merge
_COPY = "copy it again from the base model"
_OPTIONAL = ("special_tokens_map.json", "added_tokens.json")


def load_tokenizer(directory, *, any_length: bool = False) -> Any:
    """Returns transformers' fast CLIPTokenizer of a folder.

    Its words are in tokenizer.json, which transformers 5 writes, or in vocab.json and
    merges.txt, or in both.

    Args: any_length: the caller knows how long a text is; else the folder must say it,
      as for a pipeline of PyTorch.
    Raises: UserError naming the file that is missing, damaged or contradicts another.
    """
    folder = Path(directory)
    names = _check_config(folder, any_length)
    _check_files(folder, names)
    from transformers import CLIPTokenizerFast  # a second, which --help need not wait

    try:
        return CLIPTokenizerFast.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # its parsers raise whatever a value leads to
        raise UserError(
            f"{one_line(folder)}: transformers cannot read the tokenizer "
            f"({one_line(error)}); copy its files again from the base model"
        ) from error


def vector_names(token: str, vectors: int) -> list[str]:
    """Returns the tokens that stand for `token`: "<a>", "<a>_1", "<a>_2" ..."""
    return [token] + [f"{token}_{i}" for i in range(1, vectors)]


def every_vector(tokenizer, prompt: str) -> str:
    """Returns a prompt in which a word of several vectors is written as them all.

    Such a word, "<a>", was added together with "<a>_1", "<a>_2" ...
    Source: diffusers `TextualInversionLoaderMixin.maybe_convert_prompt`.
    """
    added = tokenizer.added_tokens_encoder
    if not any(name.endswith("_1") for name in added):
        return prompt
    for token in dict.fromkeys(tokenizer.tokenize(prompt)):
        if token in added:
            names, i = [token], 1
            while f"{token}_{i}" in added:
                names.append(f"{token}_{i}")
                i += 1
            prompt = prompt.replace(token, " ".join(names))
    return prompt


def write_added_tokens(tokenizer, directory) -> None:
    """Writes into a tokenizer's folder the tokens that `tokenizer` has beyond it.

    Files are changed only where a reader of today's or of older transformers looks for
    added tokens; the vocabulary stays byte for byte.
    """
    folder = Path(directory)
    vocabulary = load_tokenizer(folder).get_vocab()
    tokens = tokenizer.get_added_vocab().items()
    added = {t: i for t, i in tokens if t not in vocabulary}
    rule = dict.fromkeys(("lstrip", "rstrip", "single_word", "special"), False)
    rules = {i: {"content": t, **rule, "normalized": True} for t, i in added.items()}
    config = _read_object(folder / "tokenizer_config.json")
    if "added_tokens_decoder" in config:  # then readers look nowhere else
        config["added_tokens_decoder"] |= {str(i): rules[i] for i in rules}
        _write_json(folder / "tokenizer_config.json", config)
    if (folder / "tokenizer.json").exists():
        fast = _read_object(folder / "tokenizer.json")
        fast["added_tokens"] += [{"id": i, **rules[i]} for i in sorted(rules)]
        _write_json(folder / "tokenizer.json", fast)
    if (folder / "vocab.json").exists():
        file = folder / "added_tokens.json"
        others = _read_object(file) if file.exists() else {}
        _write_json(file, others | added)


def _write_json(file, value):
    text = json.dumps(value, indent=2, ensure_ascii=False)
    file.write_text(text + "\n", encoding="utf-8")


# --- checks of the files --------------------------------------------------------------


def _check_config(folder, any_length):
    """Returns every text in the small files: the names of marks and added tokens."""
    config = folder / "tokenizer_config.json"
    small = [folder / name for name in _OPTIONAL if (folder / name).exists()]
    if config.exists() or not any_length:
        small.append(config)
    contents = {file: _read_object(file) for file in small}
    length = contents.get(config, {}).get("model_max_length")
    if not any_length and not (type(length) is int and 3 <= length <= LARGEST):
        raise UserError(
            f"{one_line(config)}: model_max_length={shown(length)} must be the number "
            "of tokens of a prompt; write 77"
        )
    return _texts(list(contents.values()))


def _check_files(folder, names):
    fast, vocabulary = folder / "tokenizer.json", folder / "vocab.json"
    words = None
    if fast.exists():
        words = _fast_words(fast, names)
    elif not vocabulary.exists():
        raise UserError(
            f"{one_line(vocabulary)}: no such file, and no tokenizer.json; copy the "
            "tokenizer's files from the base model"
        )
    if words is None or vocabulary.exists() or (folder / "merges.txt").exists():
        split = _read_vocabulary(vocabulary), _read_merges(folder / "merges.txt")
        _check_words(vocabulary, folder / "merges.txt", *split, names)
        if words not in (None, split):
            raise UserError(
                f"{one_line(fast)} has other words or merges than vocab.json and "
                "merges.txt beside it; remove those that are not the model's"
            )


def _fast_words(file, names):
    """Returns (vocabulary, merges) of a tokenizer.json."""
    content = _read_object(file)
    model, added = content.get("model"), content.get("added_tokens")
    if not isinstance(model, dict) or not isinstance(added, list):
        raise UserError(f"{one_line(file)} has no model or added_tokens; {_COPY}")
    if model.get("type", "BPE") != "BPE":
        raise UserError(
            f"{one_line(file)}: the model's type is {shown(model['type'])}; must be "
            "BPE, as CLIP's is"
        )
    merges = model.get("merges")
    if not isinstance(merges, list):
        raise UserError(f"{one_line(file)} has no list of merges; {_COPY}")
    merges = [m.split(" ") if isinstance(m, str) else m for m in merges]
    for pair in merges:
        if not isinstance(pair, list) or list(map(type, pair)) != [str, str]:
            raise UserError(
                f"{one_line(file)}: a merge is {shown(pair)}, not two texts; {_COPY}"
            )
    merges = list(map(tuple, merges))
    vocabulary = _checked_vocabulary(file, model.get("vocab"))
    _check_words(file, file, vocabulary, merges, names | _texts(added))
    return vocabulary, merges


def _read_vocabulary(file):
    return _checked_vocabulary(file, _read_object(file))


def _checked_vocabulary(file, words):
    ids = list(words.values()) if isinstance(words, dict) else []
    if not ids or not all(type(i) is int for i in ids):
        raise UserError(f"{one_line(file)} must give each word a number; {_COPY}")
    if sorted(ids) != list(range(len(ids))):
        raise UserError(
            f"{one_line(file)} must number its {len(ids)} words from 0 on, each once; "
            f"{_COPY}"
        )
    return words


def _read_merges(file):
    """Returns the pairs of a merges.txt."""
    lines = _read_text(file).rstrip("\n").split("\n")
    if not lines[0].startswith(_HEADER):
        raise UserError(
            f"{one_line(file)}: line 1 must be '{_HEADER}: 0.2', not "
            f"{shown(lines[0])}; {_COPY}"
        )
    pairs = [tuple(line.split(" ")) for line in lines[1:]]
    for number, pair in enumerate(pairs, start=2):
        if len(pair) != 2 or not all(pair):
            raise UserError(
                f"{one_line(file)}, line {number}: {shown(lines[number - 1])} must be "
                f"two parts of a word; {_COPY}"
            )
    return pairs


def _check_words(vocabulary_file, merges_file, vocabulary, merges, names):
    """Raises UserError unless merges and vocabulary are of the same words, all of them.

    A merges.txt cut short is seen by this only: a word that no merge makes would fall
    into letters.
    """
    words = set()
    for pair in merges:
        text = "".join(pair)
        for part in (*pair, text):
            if part not in vocabulary:
                raise UserError(
                    f"{one_line(merges_file)} merges {shown(' '.join(pair))}, but "
                    f"{shown(part)} is no word of {vocabulary_file.name}; copy both "
                    "again from the base model"
                )
        words.add(text)
    for word in vocabulary:
        is_byte = len(word.removesuffix(_END_OF_WORD)) == 1
        is_mark = word in names or (word[:2] == "<|" and word[-2:] == "|>")
        if not (is_byte or is_mark or word in words):
            raise UserError(
                f"{one_line(merges_file)} has no merge that makes {shown(word)}, a "
                f"word of {vocabulary_file.name}, and may be cut short; {_COPY}"
            )


def _texts(value):
    """Returns every text in a value of JSON, keys included: the names of tokens."""
    if isinstance(value, str):
        return {value}
    if isinstance(value, dict):
        value = [*value, *value.values()]
    return set().union(*map(_texts, value)) if isinstance(value, list) else set()


def _read_object(file):
    text = _read_text(file)
    try:
        value = parse_json(text)
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{one_line(file)} is not valid JSON ({one_line(error)}), maybe cut short; "
            f"{_COPY}"
        ) from None
    if not isinstance(value, dict):
        raise UserError(
            f"{one_line(file)} must hold a JSON object, not {type(value).__name__}; "
            f"{_COPY}"
        )
    return value


def _read_text(file):
    """Returns a file's text; UserError with the remedy if it cannot be the file."""
    if not file.is_file():  # to read a pipe would wait for a writer
        raise UserError(
            f"{one_line(file)}: no such file; copy the tokenizer's files from the base "
            "model"
        )
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{one_line(file)} cannot be read as text ({one_line(error)}); {_COPY}"
        ) from None
    if damage.is_pointer(text.encode()):
        raise UserError(
            f"{one_line(file)} is a git-lfs pointer, not the file; run git lfs pull in "
            "the folder that it was cloned to"
        )
    if not text.strip():
        raise UserError(f"{one_line(file)} is empty; {_COPY}")
    if damage.merge_mark_line(text):
        raise UserError(
            f"{one_line(file)} has the marks of a merge conflict (<<<<<<<); {_COPY}"
        )
    return text
