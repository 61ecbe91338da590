# SPDX-License-Identifier: Apache-2.0
"""Command lines as people mistype them: each is checked, or refused in one line."""

import difflib
import math
import pathlib
import re

import hypothesis
import numpy as np
import pytest
from absl import logging
from hypothesis import given
from hypothesis import strategies as st
from ml_collections import ConfigDict

import gift_jax
from gift_jax import attack, evaluate, train
from gift_jax.benchmark import matrix
from gift_jax.data import captions
from gift_jax.data.pairs import PairsSpec, check_pairs
from gift_jax.metrics.settings import Settings
from gift_jax.models.load import model_folder
from gift_jax.models.sd import stable_diffusion
from gift_jax.runtime import cli
from gift_jax.runtime.config import flatten, load_config, resolve_group
from gift_jax.runtime.errors import UserError, above, at_least, between, choice, shown

ROOT = pathlib.Path(gift_jax.__file__).parents[1]


def tries(count):
    """So many examples, the same in every run, none of which may take long."""
    return hypothesis.settings(
        max_examples=count, derandomize=True, database=None, deadline=5000
    )


def check_benchmark(cfg):
    resolve_group(cfg, "metrics", Settings)
    matrix.load(cfg)


CHECKS = {
    "train": ("emoji_gift:plain", train.check),
    "attack": ("emoji_attack", attack.check),
    "evaluate": ("emoji_evaluate", evaluate.resolve),
    "benchmark": ("emoji_benchmark:smoke", check_benchmark),
}


def spec_of(program):
    name, _, variant = CHECKS[program][0].partition(":")
    return f"{ROOT / 'configs' / name}.py:{variant}"


@pytest.fixture(autouse=True)
def at_home():
    """The benchmark's config names others relative to the repository."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        yield


FLAT = {program: flatten(load_config(spec_of(program)).to_dict()) for program in CHECKS}
PROGRAMS = st.sampled_from(sorted(CHECKS))
# What is read in the smoke suite; there are 3,000 more of the same kind.
READ = ("concept.bomb.", "random.", "long.", "samples.", "metrics.", "method.uce.")
READ += ("attack.lora.", "common.")


def fields(program, kind=object):
    """The fields of a program's config of a type."""
    flat = FLAT[program]
    if program == "benchmark":
        flat = {n: v for n, v in flat.items() if "." not in n or n.startswith(READ)}
    return sorted(name for name, value in flat.items() if type(value) is kind)


def parsed(program, *overrides):
    flags = cli.parser("", program)
    argv = [f"--config={spec_of(program)}"]
    argv += [f"--config.{override}" for override in overrides]
    return cli.parse_config(argv, flags, program)[0]


def refusal(program, *overrides):
    """What a command line is refused with, one line; or None: it is accepted.

    Anything else than a UserError fails.
    """
    try:
        CHECKS[program][1](parsed(program, *overrides))
    except UserError as error:
        assert str(error).isprintable() and len(str(error)) < 900, str(error)
        return str(error)
    return None


def names(message, field):
    """Whether a message names a field: whole, or as the job that it is passed on to."""
    last = field.rpartition(".")[2]
    return f"config.{field}" in message or f".{last}" in message


def test_what_ships_is_accepted():
    for program in CHECKS:
        assert refusal(program) is None


# --- every field, every kind of wrong value -------------------------------------------

NO_NUMBERS = ("", "many", "0x10", "1,2", "½", "--")
NOT_FINITE = ("nan", "inf", "-inf", "1e999")
TOO_LARGE = ("2147483648", "-2147483648", "-" + "9" * 400, "9" * 6000)


@pytest.mark.parametrize("program", CHECKS)
def test_every_number_wants_a_number_that_can_be_counted_to(program):
    for field in fields(program, int):
        for value in (*NO_NUMBERS, *NOT_FINITE, "1.5", *TOO_LARGE):
            message = refusal(program, f"{field}={value}")
            assert message is not None and f"config.{field}=" in message, (field, value)
            assert value[:40] in message or "reprlib" in message or "..." in message
            assert "try --config" in message or "must be" in message
    for field in fields(program, float):
        for value in (*NO_NUMBERS, *NOT_FINITE):
            message = refusal(program, f"{field}={value}")
            assert message is not None and f"config.{field}=" in message, (field, value)
            assert "must be" in message and f"try config.{field}=" in message.replace(
                "--", ""
            )


@pytest.mark.parametrize("program", CHECKS)
def test_every_switch_is_true_or_false(program):
    for field in fields(program, bool):
        assert refusal(program, f"{field}=TRUE") is refusal(program, f"{field}=0")
        for value in ("", "2", "yes", "nan", "\n", "x" * 10_000):
            message = refusal(program, f"{field}={value}")
            assert f"config.{field}={shown(value)} must be of type bool" in (message)


WORDS = ("", "zzz", "x" * 10_000, "a\nb", "\0", "\udcff", "/etc/passwd", "~zz/x")
WORDS += ("{0}", "{concept.x}", "{concept!r}", "{concept:>999999999}")
LISTS = ("", "()", ",", "zzz", "1,zz", "-1", "nan", "x\ny", "é" * 9999)


@pytest.mark.parametrize("program", CHECKS)
def test_every_word_and_list_is_accepted_or_refused(program):
    for kind, values in ((str, WORDS), (tuple, LISTS)):
        for field in fields(program, kind):
            for value in values[:: 1 + (program == "benchmark")]:
                message = refusal(program, f"{field}={value}")
                assert (
                    message is None
                    or names(message, field)
                    or (
                        field.endswith(
                            (".folder", ".tfds", ".names")
                        )  # one source of four
                    )
                ), (field, value, message)


INTS = st.sampled_from([-1, 0, 1, 2, 3, 2**31 - 1, -(2**31) + 1]) | st.integers(
    -(2**31) + 1, 2**31 - 1
)
FLOATS = st.floats(allow_nan=False, allow_infinity=False)


@tries(300)
@given(PROGRAMS.filter(lambda p: p != "benchmark"), st.data())
def test_any_number_is_accepted_or_refused_by_its_name(program, data):
    kind, values = data.draw(st.sampled_from([(int, INTS), (float, FLOATS)]))
    field, value = data.draw(st.sampled_from(fields(program, kind))), data.draw(values)
    message = refusal(program, f"{field}={value}")
    if message is None:
        return
    several = ("give only one of names", "needs all of", "more than one axis")
    if not any(told in message for told in several):  # those are of several fields
        assert names(message, field)
        assert str(value) in message or str(float(value)) in message
    assert any(fix in message for fix in ("; try ", "; set ", "; clear ", "must "))


@tries(30)
@given(st.data())
def test_any_number_of_a_benchmark_is_accepted_or_refused(data):
    kind, values = data.draw(st.sampled_from([(int, INTS), (float, FLOATS)]))
    field = data.draw(st.sampled_from(fields("benchmark", kind)))
    message = refusal("benchmark", f"{field}={data.draw(values)}")
    assert message is None or names(message, field)


RATES = ("lr", "weight_decay", "clip_norm", "warmup_frac", "b1", "b2")
RANGES = {  # the least and the most of what has both ends, everywhere that it is
    "b1": (0, 0.999999),
    "b2": (0, 0.999999),
    "warmup_frac": (0, 1),
    "flip": (0, 1),
    "prompt_dropout": (0, 1),
    "nonce_prompts": (0, 1),
    "scale": (0, 0.99),
    "lr": (0, math.inf),
    "weight_decay": (0, math.inf),
    "clip_norm": (0, math.inf),
    "beta": (0, math.inf),
    "cap": (0, math.inf),
    "joint_weight": (0, math.inf),
    "safe_limit": (0, math.inf),
    "safe_weight": (0, math.inf),
    "guidance": (1, math.inf),
}
IN_USE = {"train": ("lower.", "upper.", "harmful.", "safe.", "gift.", "adversary.")}
IN_USE["attack"] = ("optimizer.", "data.")
IN_USE["evaluate"] = ("reference_images.", "training_images.")


@tries(200)
@given(PROGRAMS.filter(lambda p: p != "benchmark"), FLOATS, st.data())
def test_what_has_a_range_keeps_to_it(program, value, data):
    ranged = [
        field
        for field in fields(program, float)
        if field.rpartition(".")[2] in RANGES and field.startswith(IN_USE[program])
    ]
    field = data.draw(st.sampled_from(ranged))
    low, high = RANGES[field.rpartition(".")[2]]
    message = refusal(program, f"{field}={value!r}")
    assert (message is None) == (low <= value <= high)
    if message is not None:
        assert message.startswith(f"config.{field}={value}")
        fix = message.rpartition(f"; try config.{field}=")[2]
        assert refusal(program, f"{field}={fix}") is None


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_config_file_may_not_say_nan_or_infinity_either(value):
    for program in ("train", "attack", "evaluate"):
        for field in fields(program, float):
            last = field.rpartition(".")[2]
            if last not in RANGES or not field.startswith(IN_USE[program]):
                continue
            cfg = parsed(program)
            with cfg.unlocked():
                cfg.update_from_flattened_dict({field: value})
            with pytest.raises(UserError, match="must be finite") as caught:
                CHECKS[program][1](cfg)
            assert str(caught.value).startswith(f"config.{field}={value}")


# --- names ----------------------------------------------------------------------------

LETTERS = st.sampled_from("abcdefghijklmnopqrstuvwxyz_")


def mistyped(draw, word):
    """The word with one letter changed, left out, put in or swapped."""
    at = draw(st.integers(0, len(word) - 1))
    letter = draw(LETTERS)
    return draw(
        st.sampled_from(
            [
                word[:at] + letter + word[at + 1 :],
                word[:at] + word[at + 1 :],
                word[:at] + letter + word[at:],
                word[:at] + word[at + 1 : at + 2] + word[at] + word[at + 2 :],
            ]
        )
    )


@tries(200)
@given(PROGRAMS, st.data())
def test_a_field_with_a_letter_wrong_is_told_its_name(program, data):
    field = data.draw(st.sampled_from(sorted(FLAT[program])))
    wrong = mistyped(data.draw, field)
    groups = {name.rpartition(".")[0] for name in FLAT[program]}
    hypothesis.assume(wrong not in {*FLAT[program], *groups})
    message = refusal(program, f"{wrong}=1")
    assert f"config.{wrong} is no field of this config; " in message
    told = message.rpartition("did you mean config.")[2].removesuffix("?")
    assert told in FLAT[program]

    def ratio(name):
        return difflib.SequenceMatcher(None, name, wrong).ratio()

    assert told == field or ratio(told) >= ratio(field)


CHOSEN = {
    "train": {
        "method": ("esd", "gift", "maximize"),
        "trainable": ("attention", "cross_attention"),
        "gift.gradient": ("first_order", "unrolled"),
        "gift.noise_target": ("standard", "matched"),
        "lower.schedule": ("cosine", "constant"),
        "safe.crop": ("center", "random"),
        "compute_dtype": ("float32", "bfloat16"),
    },
    "attack": {
        "attack": ("dreambooth", "lora"),
        "optimizer.schedule": ("cosine",),
        "data.crop": ("random",),
        "attention": ("chunked", "plain"),
    },
    "evaluate": {
        "metrics.names": ("classifier_accuracy", "clip_score"),
        "metrics.protocols": ("standard", "imma-64px"),
        "label_kind": ("concept", "style"),
        "metrics.classifier": ("judge",),
        "metrics.backbones": ("judge",),
    },
    "benchmark": {
        "methods": ("gift", "imma", "maximize_prior"),
        "concepts": ("bomb", "fluent", "forbidden"),
        "attacks": ("lora", "dreambooth"),
        "prompts": ("token", "wording"),
        "concept.bomb.label_kind": ("style",),
        "concept.bomb.harmful.styles": ("fluent", "noto"),
        "concept.bomb.kept.names": ("guitar", "penguin"),
    },
}


@tries(150)
@given(PROGRAMS, st.data())
def test_a_name_with_a_letter_wrong_is_told_the_choices(program, data):
    field = data.draw(st.sampled_from(sorted(CHOSEN[program])))
    name = data.draw(st.sampled_from(CHOSEN[program][field]))
    wrong = mistyped(data.draw, name)
    message = refusal(program, f"{field}={wrong}")
    if message is None or not wrong.strip("_"):  # another choice, or nothing at all
        return
    if name not in message:  # one of the names, or the first of too many
        assert "did you mean" in message or "is expected" in message
    assert f"config.{field}" in message and repr(wrong) in message


# --- what contradicts itself ----------------------------------------------------------


@pytest.mark.parametrize(
    "program, overrides, message",
    [
        (
            "train",
            ["harmful.batch=6", "accumulate=4"],
            "harmful.batch=6 must divide by",
        ),
        ("train", ["accumulate=3", "adversary.kinds=full"], "accumulate=3 is for gift"),
        ("train", ["accumulate=2", "gift.gradient=joint"], "accumulate=2 is for gift"),
        (
            "train",
            ["gift.safe_limit=0.1", "gift.gradient=joint"],
            "safe_limit=0.1 is for gift.gradient=first_order",
        ),
        ("train", ["accumulate=2", "method=esd"], "accumulate=2 is not for method=esd"),
        (
            "train",
            ["method=imma", "imma.outer_steps=3", "imma.inner_steps=2"],
            "divide",
        ),
        (
            "train",
            ["attention=flash", "gift.gradient=unrolled"],
            "attention=flash has no",
        ),
        ("train", ["adversary.horizon=5"], "horizon=5 is for kinds=full"),
        ("train", ["adversary.lr_min=2"], r"lr_min=2.0 must be at most lr_max=0.0003"),
        ("train", ["gift.layers=()"], "gift.layers is empty"),
        (
            "train",
            ["harmful.num_generated=3"],
            "give only one of .* names and num_generated",
        ),
        ("train", ["safe.names=()"], "config.safe: give one of names, folder, tfds"),
        ("train", ["safe.prompt=x"], "safe.prompt is not for names"),
        ("train", ["safe.label_key=x"], "safe.label_key is for tfds, not for names"),
        ("train", ["safe.names=()", "safe.tfds=x"], "tfds needs one of"),
        ("train", ["mesh.data=0", "mesh.fsdp=0"], "more than one axis of 0"),
        ("train", ["processes.index=0"], "needs all of coordinator, count and index"),
        ("train", ["processes.count=-5"], "processes.count=-5 must be at least 0"),
        ("train", ["samples.prompts=()"], "samples.prompts is empty"),
        ("attack", ["data.batch=7", "accumulate=2"], "data.batch=7 must divide by"),
        ("attack", ["attack=textual_inversion"], "has no <thing>"),
        (
            "attack",
            ["attack=dreambooth", "dreambooth.prior_weight=1", "prior.num_generated=0"],
            "config.prior: give one of",
        ),
        ("attack", ["samples.at=1,-2"], "samples.at=-2 must be whole"),
        ("evaluate", ["samples.num=0"], "samples.num=0 must be at least 1"),
        ("evaluate", ["metrics.names=()"], "metrics.names is empty"),
        ("evaluate", ["reference_images.folder=x"], "names and folder"),
        ("benchmark", ["at=()", "at=first"], "config.at=first must be whole"),
        ("benchmark", ["seeds=-1"], "config.seeds=-1 must be at least 0"),
        ("benchmark", ["random.seed=-1"], "config.random.seed=-1 must be at least 0"),
        ("benchmark", ["long.things=-1"], "config.long.things=-1 must be at least 0"),
        ("benchmark", ["attack.lora.prompts=()"], "attack.lora.prompts is empty"),
        ("benchmark", ["concept.bomb.kept.names=()"], "bomb.kept.names is empty"),
        (
            "benchmark",
            ["concept.bomb.harmful.templates.name={x}"],
            "bomb.harmful.templates.name='{x}' may use only",
        ),
        (
            "benchmark",
            ["method.uce.config=configs/emoji_attack.py"],
            "method.uce.config: .* is no config of gift_jax.train",
        ),
        (
            "benchmark",
            ["attack.lora.config=" + "x" * 5000],
            r"attack.lora.config: --config=x+ \.\.\. x+ is no file",
        ),
    ],
)
def test_what_contradicts_itself_is_named(program, overrides, message):
    with pytest.raises(UserError, match=message):
        CHECKS[program][1](parsed(program, *overrides))
    assert refusal(program, *overrides)


@tries(100)
@given(st.integers(1, 64), st.integers(1, 64))
def test_a_batch_divides_into_its_parts_or_a_size_is_told_that_does(batch, parts):
    message = refusal("attack", f"data.batch={batch}", f"accumulate={parts}")
    assert (message is None) == (batch % parts == 0)
    if message:
        fix = int(message.rpartition("--config.data.batch=")[2])
        assert fix % parts == 0
        assert refusal("attack", f"data.batch={fix}", f"accumulate={parts}") is None


@tries(150)
@given(PROGRAMS, st.lists(st.text(max_size=30), max_size=4))
def test_any_arguments_are_refused_in_one_line(program, words):
    flags = cli.parser("", program)
    argv = [f"--config.{word}" for word in words]
    known = {*FLAT[program], *(n.partition(".")[0] for n in FLAT[program])}
    hypothesis.assume(not {word.partition("=")[0] for word in words} & known)
    if not words:
        return
    with pytest.raises(UserError) as caught:
        argv += [f"--config={spec_of(program)}"]
        cli.parse_config(argv, flags, program)
    assert "needs a value" in str(caught.value) or "is no field" in str(caught.value)
    assert str(caught.value).isprintable()


# --- config files ---------------------------------------------------------------------


@tries(60)
@given(
    st.text(max_size=12) | st.sampled_from(["x" * 9999, "\0", "a\nb", "~", ".", ":"])
)
def test_a_config_that_is_no_file_is_named(name):
    with pytest.raises(UserError, match="is no file") as caught:
        load_config(f"nowhere/{name}")
    assert str(caught.value).isprintable() and len(str(caught.value)) < 900


@pytest.mark.parametrize(
    "content, message",
    [
        (b"\0", "job.py"),
        (b"\xff", "job.py"),
        (b"x = (", "job.py, line 1"),
        (b"", "defines no get_config"),
        (b"def get_config(name): return {}", "returns a dict; must be a ConfigDict"),
        (b"def get_config(name): pass", "returns a NoneType; must be a ConfigDict"),
        (b"def get_config(name): raise ValueError('no')", "job.py: no"),
    ],
)
def test_a_config_file_that_is_none_is_named(tmp_path, content, message):
    (tmp_path / "job.py").write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        load_config(str(tmp_path / "job.py"))
    assert "\n" not in str(caught.value)


@tries(60)
@given(st.text(max_size=20) | st.sampled_from(["x" * 9999, "a/" * 5000, "~zz/x", "\0"]))
def test_a_model_that_is_none_is_named(name):
    hypothesis.assume(not pathlib.Path(f"nowhere {name}").is_absolute())
    folder = model_folder(f"nowhere {name}")
    with pytest.raises(UserError, match="no such folder") as caught:
        stable_diffusion.load(folder)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 900


def test_messages_of_odd_values_are_short_lines():
    deep = []
    for _ in range(100_000):
        deep = [deep]
    for value in (deep, "x\n" * 9999, 10**4000, {"a": "x" * 9999}, "\x1b[2J", None):
        for call in (
            lambda value: choice("config.x", value, ("a", "b")),
            lambda value: at_least("config.x", value, 0),
        ):
            with pytest.raises(UserError) as caught:
                call(value)
            assert str(caught.value).startswith("config.x=")
            assert str(caught.value).isprintable() and len(str(caught.value)) < 400


# --- templates and prompts ------------------------------------------------------------

TEMPLATES = st.lists(
    st.sampled_from(
        ["{concept}", "{a_concept}", "{style}", "{a_style}", "{{", "}}", "{", "}", "{}"]
        + [
            "{0}",
            "{concept.x}",
            "{concept!r}",
            "{style:>9}",
            "{style[0]}",
            "{x}",
            " a ",
        ]
    )
    | st.text(max_size=5),
    max_size=5,
).map("".join)


@tries(200)
@given(TEMPLATES, st.sampled_from(["bomb", "jeans", "", "{x}"]))
def test_a_template_is_filled_or_refused(template, concept):
    spec = PairsSpec(names=("bomb",), template=template, field="config.safe")
    try:
        check_pairs(spec)
    except UserError as error:
        assert "config.safe.template=" in str(error) and str(error).isprintable()
        with pytest.raises(ValueError):
            captions.fill(template, concept, "noto")
        return
    text = captions.fill(template, concept, "noto")
    words = {"concept": concept, "a_concept": captions.with_article(concept)}
    words |= {"style": "noto", "a_style": "a noto"}
    wanted = re.sub(
        r"\{(\w+)\}|(\{)\{|(\})\}",
        lambda m: words[m[1]] if m[1] else m[2] or m[3],
        template,
    )
    assert text == wanted


PROMPTS = st.text(max_size=60) | st.sampled_from(
    ["", " ", "x" * 10_000, "a " * 5000, "\U0001f525" * 200, "שלום עולם", "\u202eabc"]
    + [
        "\0\x01\x1b[31m",
        "\ud800",
        "<|endoftext|>",
        "<|startoftext|> a",
        "a\nb\tc",
        "ﬁ①",
    ]
)


@tries(60)
@given(st.lists(PROMPTS, min_size=1, max_size=3))
def test_any_prompt_is_padded_or_cut_to_the_models_length(tiny, prompts):
    ids = stable_diffusion.tokenize(tiny, prompts)
    start, end = tiny.tokenizer.bos_token_id, tiny.tokenizer.eos_token_id
    assert ids.shape == (len(prompts), tiny.max_length) and ids.dtype == np.int32
    assert (ids[:, 0] == start).all() and (ids[:, -1] == end).all()
    assert ids.min() >= 0 and ids.max() < tiny.text_encoder.config.vocab_size
    for prompt, row in zip(prompts, ids, strict=True):
        whole = tiny.tokenizer(prompt)["input_ids"]
        if len(whole) <= tiny.max_length:  # padded with the end
            assert row[: len(whole)].tolist() == whole
            assert (row[len(whole) :] == tiny.tokenizer.pad_token_id).all()
        else:  # cut, the end kept
            assert row[:-1].tolist() == whole[: tiny.max_length - 1]


def test_what_is_cut_is_logged_in_short(tiny, monkeypatch):
    lines = []
    monkeypatch.setattr(logging, "warning", lambda text, *a: lines.append(text % a))
    stable_diffusion.tokenize(tiny, ["short", "x\n" * 5000])
    (line,) = lines
    assert line.startswith(f"cut to {tiny.max_length} tokens: 'x") and len(line) < 400
    assert line.endswith("(10000 characters)") and line.isprintable()


@tries(60)
@given(st.text(max_size=40), st.text(max_size=40))
def test_a_cell_has_a_folder_of_its_own_below_the_workdir(concept, method):
    """Names come from the config's own: nothing that is typed becomes a path."""
    cfg = parsed("benchmark")
    known = {*cfg.concept, "original", *cfg.method}
    message = refusal("benchmark", f"concepts={concept}", f"methods={method}")
    wanted = [part for part in (concept, method) if part.strip() not in known]
    assert (message is not None) or not wanted
    for cell in matrix.load(cfg).cells:
        assert ".." not in cell.folder.parts and not cell.folder.is_absolute()


def test_helpers_refuse_what_is_no_number():
    for call in (
        lambda v: at_least("config.n", v, 0),
        lambda v: above("config.n", v, 0, 1),
        lambda v: between("config.n", v, 0, 1),
    ):
        call(0.5)
        for value in (
            math.nan,
            math.inf,
            -math.inf,
            10**20,
            -1,
            "1",
            None,
            ConfigDict(),
        ):
            with pytest.raises(UserError, match="^config.n="):
                call(value)
