# SPDX-License-Identifier: Apache-2.0
"""A folder's tokenizer: the ids of today's, of every layout; damage is one line."""

import json
import shutil

import pytest
import transformers
from captions_of_scripts import CAPTIONS, SCRIPTS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

from gift_jax.models import exports
from gift_jax.models.load import EMBEDDED
from gift_jax.models.sd import stable_diffusion
from gift_jax.models.tokenizer import every_vector, load_tokenizer, write_added_tokens
from gift_jax.runtime.errors import UserError

START, END = "<|startoftext|>", "<|endoftext|>"
SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
SOME = ["a noto emoji of a bomb!", "一只猫", "café <|endoftext|>", "🐱" * 40, ""]
FEW_EXAMPLES = settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@pytest.fixture
def split(tmp_path):
    """emoji-sd's tokenizer: vocab.json, merges.txt and two small files."""
    return shutil.copytree(EMBEDDED / "tokenizer", tmp_path / "tokenizer")


@pytest.fixture
def unified(split):
    """The same as transformers 5 writes it: tokenizer.json and a small file."""
    load_tokenizer(split).save_pretrained(str(split))
    for name in ("vocab.json", "merges.txt", "special_tokens_map.json"):
        (split / name).unlink()
    config = json.loads((split / "tokenizer_config.json").read_text(encoding="utf-8"))
    config.pop("added_tokens_decoder", None)  # of transformers 4
    (split / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return split


def reference(folder, pad, length):
    """CLIP's tokenizer as transformers 5 builds it, from the words of a folder."""
    words = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")[1:-1]
    merges = [tuple(line.split(" ")) for line in lines]
    model = models.BPE(words, merges, unk_token=END, end_of_word_suffix="</w>")
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.NFC(),
            normalizers.Replace(Regex(r"\s+"), " "),
            normalizers.Lowercase(),
        ]
    )
    marks = r"<\|startoftext\|>|<\|endoftext\|>|"
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(marks + SPLIT), "removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.add_special_tokens(list(dict.fromkeys([START, END, pad])))
    tokenizer.post_processor = processors.RobertaProcessing(
        (END, words[END]), (START, words[START]), False, False
    )
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(pad_id=words[pad], pad_token=pad, length=length)
    return tokenizer


def padded(tokenizer, texts, length=32):
    how = {"padding": "max_length", "truncation": True, "max_length": length}
    return tokenizer(list(texts), **how)["input_ids"]


def edit(file, **values):
    content = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(content | values), encoding="utf-8")


@pytest.mark.parametrize("pad", [END, "!"])
@pytest.mark.parametrize("layout", ["split", "unified"])
def test_ids_are_those_of_todays_fast_tokenizer(layout, pad, split, request):
    assert len(SCRIPTS) >= 30 and len(CAPTIONS) >= 250
    edit(split / "special_tokens_map.json", pad_token=pad)  # as in SD 2.1
    expected = reference(split, pad, 32).encode_batch(CAPTIONS)
    folder = request.getfixturevalue(layout)
    ids = padded(load_tokenizer(folder), CAPTIONS)
    for caption, ours, theirs in zip(CAPTIONS, ids, expected, strict=True):
        assert ours == theirs.ids, caption


@pytest.mark.skipif(transformers.__version__[:2] == "4.", reason="lowercases marks")
def test_marks_in_capitals_are_text(split):
    expected = reference(split, END, 32).encode("<|ENDOFTEXT|>").ids
    assert padded(load_tokenizer(split), ["<|ENDOFTEXT|>"]) == [expected]


def test_two_layouts_side_by_side_must_agree(split):
    expected = padded(load_tokenizer(split), SOME)
    load_tokenizer(split).save_pretrained(str(split))
    assert (split / "tokenizer.json").exists() and (split / "merges.txt").exists()
    assert padded(load_tokenizer(split), SOME) == expected
    content = json.loads((split / "tokenizer.json").read_text(encoding="utf-8"))
    words = content["model"]["vocab"]
    words["!"], words['"'] = words['"'], words["!"]
    (split / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(UserError, match=r"tokenizer.json has other words or merges"):
        load_tokenizer(split)


# --- added tokens ---------------------------------------------------------------------


@pytest.mark.parametrize("listed", [False, True], ids=["plain", "listed in the config"])
@pytest.mark.parametrize("layout", ["split", "unified"])
def test_added_tokens_are_read_again_and_the_words_stay(layout, listed, request):
    folder = request.getfixturevalue(layout)
    if listed:  # as transformers 4 writes it
        marks = {1937: START, 1938: END}
        rule = dict.fromkeys(("lstrip", "rstrip", "single_word", "normalized"), False)
        marks = {i: {"content": t, "special": True, **rule} for i, t in marks.items()}
        edit(folder / "tokenizer_config.json", added_tokens_decoder=marks)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    tokenizer = load_tokenizer(folder)
    tokenizer.add_tokens(["<é>", "<é>_1"])
    write_added_tokens(tokenizer, folder)
    after = {file.name: file.read_bytes() for file in folder.iterdir()}
    changed = {name for name in after if after[name] != before.get(name)}
    named = {"split": "added_tokens.json", "unified": "tokenizer.json"}[layout]
    assert changed == {named} | ({"tokenizer_config.json"} if listed else set())
    again = load_tokenizer(folder)
    texts = [*SOME, "a <é> cat", "a<é>_1b", "<É>"]
    for every in (lambda t, text: text, every_vector):
        ids = [padded(t, [every(t, x) for x in texts]) for t in (again, tokenizer)]
        assert ids[0] == ids[1]
    words = len(json.loads((EMBEDDED / "tokenizer" / "vocab.json").read_text()))
    assert padded(again, [every_vector(again, "<é>")])[0][1:3] == [words, words + 1]


def test_exports_keep_the_tokenizer_as_it_is(tiny_folder, tmp_path):
    base, out, inverted = (tmp_path / name for name in ("base", "out", "inverted"))
    shutil.copytree(tiny_folder, base)
    load_tokenizer(base / "tokenizer").save_pretrained(str(base / "tokenizer"))
    (base / "tokenizer" / "vocab.json").unlink()
    (base / "tokenizer" / "merges.txt").unlink()
    exports.export(base, {}, out)
    before = {f.name: f.read_bytes() for f in (base / "tokenizer").iterdir()}
    assert "tokenizer.json" in before
    assert {f.name: f.read_bytes() for f in (out / "tokenizer").iterdir()} == before
    tokenizer = load_tokenizer(out / "tokenizer")
    assert stable_diffusion.load(out).tokenize(SOME).shape == (len(SOME), 16)
    tokenizer.add_tokens(["<a>"])
    exports.export(base, {}, inverted, tokenizer=tokenizer)
    ids = [
        padded(t, ["a <a> 猫"])
        for t in (tokenizer, load_tokenizer(inverted / "tokenizer"))
    ]
    assert ids[0] == ids[1]


# --- damage ---------------------------------------------------------------------------

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0a\nsize 30151\n"
DAMAGES = {
    "missing": None,
    "a folder": "",
    "empty": lambda data: b"",
    "blank": lambda data: b" \n",
    "pointer": lambda data: POINTER,
    "both sides": lambda data: b"<<<<<<< HEAD\n%b=======\n%b>>>>>>> b\n" % (data, data),
    "conflict": lambda data: data[:40] + b"\n<<<<<<< HEAD\n=======\n" + data[40:],
    "cut in half": lambda data: data[: len(data) // 2],
    "last line cut": lambda data: data.rstrip().rpartition(b"\n")[0],
    "last byte cut": lambda data: data.rstrip()[:-1],
    "first line cut": lambda data: data.partition(b"\n")[2],
    "binary": lambda data: bytes(range(256)) * 9,
    "zeros": lambda data: bytes(len(data)),
    "zeros at the end": lambda data: data + bytes(64),
    "UTF-16": lambda data: data.decode().encode("utf-16"),
    "byte order mark": lambda data: b"\xef\xbb\xbf" + data,
    "line ends of Windows": lambda data: data.replace(b"\n", b"\r\n"),
    "twice": lambda data: data + data,
    "list": lambda data: b"[]",
    "number": lambda data: b"5",
    "null": lambda data: b"null",
    "no entries": lambda data: b"{}",
    "words in a list": lambda data: json.dumps(list(json.loads(data))).encode(),
    "numbers as texts": lambda data: data.replace(b": 1", b': "1"').replace(
        b'""', b'"'
    ),
    "web page": lambda data: b"<!DOCTYPE html><html>404</html>\n",
}
SPLIT_FILES = (
    *("vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json"),
)


def check_damaged(folder, name, expected):
    """One line that names the file, or the ids that there were."""
    try:
        ids = padded(load_tokenizer(folder), SOME)
    except UserError as error:
        message = str(error)
        assert "\n" not in message and len(message) < 800
        assert name in message or "transformers cannot read" in message, message
        assert any(w in message for w in ("copy", "git lfs pull", "write 77", "remove"))
    else:
        assert ids == expected


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_files_are_one_line_or_harmless(split, damage):
    tokenizer = load_tokenizer(split)
    tokenizer.add_tokens(["<a>"])
    write_added_tokens(tokenizer, split)  # a fifth file
    expected = padded(load_tokenizer(split), SOME)
    for name in (*SPLIT_FILES, "added_tokens.json"):
        data = (split / name).read_bytes()
        spoil(split / name, damage)
        check_damaged(split, name, expected)
        restore(split / name, data)


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_unified_files_are_one_line_or_harmless(unified, damage):
    expected = padded(load_tokenizer(unified), SOME)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        data = (unified / name).read_bytes()
        spoil(unified / name, damage)
        check_damaged(unified, name, expected)
        restore(unified / name, data)


def spoil(file, damage):
    change = DAMAGES[damage]
    if callable(change):
        try:
            file.write_bytes(change(file.read_bytes()))
        except ValueError:  # no JSON to change
            return
    else:
        file.unlink()
        if change is not None:
            file.mkdir()


def restore(file, data):
    if file.is_dir():
        file.rmdir()
    file.write_bytes(data)


@FEW_EXAMPLES
@given(name=st.sampled_from(SPLIT_FILES), place=st.floats(0, 1), data=st.data())
def test_files_cut_or_overwritten_anywhere(split, name, place, data):
    original = (split / name).read_bytes()
    expected = padded(load_tokenizer(split), SOME)
    place = int(place * len(original))
    rest = data.draw(st.sampled_from([b"", b"\0" * 9, b"\xff", b"<<<<<<< HEAD\n"]))
    tail = original[place + len(rest) :] if rest else b""
    (split / name).write_bytes(original[:place] + rest + tail)
    try:
        check_damaged(split, name, expected)
    finally:
        (split / name).write_bytes(original)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "merges.txt",
            POINTER,
            r"merges.txt is a git-lfs pointer, .*; run git lfs pul",
        ),
        (
            "vocab.json",
            POINTER,
            r"vocab.json is a git-lfs pointer, .*; run git lfs pul",
        ),
        ("merges.txt", b"", r"merges.txt is empty; copy it again from the base model"),
        (
            "tokenizer_config.json",
            b"{\n<<<<<<< HEAD\n",
            r"config.json has the marks of a",
        ),
        ("tokenizer_config.json", b"{}", r"model_max_length=None must be .*; write 77"),
        ("vocab.json", b'{"a": 1}', r"must number its 1 words from 0 on, each once"),
        ("merges.txt", b"#version: 0.2\n", r"has no merge that makes '.*be cut short"),
    ],
)
def test_message_names_the_file_and_the_remedy(split, name, content, message):
    (split / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_tokenizer(split)


def test_length_may_be_the_callers(split):
    expected = padded(load_tokenizer(split), SOME)
    (split / "tokenizer_config.json").unlink()
    assert padded(load_tokenizer(split, any_length=True), SOME) == expected


def test_folder_without_words_is_refused(split):
    (split / "vocab.json").unlink()
    with pytest.raises(UserError, match=r"vocab\.json: no such file, and no tok"):
        load_tokenizer(split)
