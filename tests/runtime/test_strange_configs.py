# SPDX-License-Identifier: Apache-2.0
"""Configs and flags as people mistype them: they work, or are refused in one line."""

import pathlib
import re

import hypothesis
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from properties import outcome, tries

import gift_jax
from gift_jax import attack, evaluate, train
from gift_jax.benchmark import settings as benchmark
from gift_jax.data import captions
from gift_jax.data.pairs import PairsSpec, check_pairs
from gift_jax.models.load import load_model
from gift_jax.runtime import cli, config, errors
from gift_jax.runtime.config import load_config

CONFIGS = pathlib.Path(gift_jax.__file__).parents[1] / "configs"
RESOLVE = {
    "train": train.resolve,
    "attack": attack.resolve,
    "evaluate": evaluate.resolve,
    "benchmark": benchmark.resolve,
}
NAMES = {  # of config files
    "emoji_gift": "train",
    "emoji_gift_adversarial": "train",
    "emoji_gift_gate": "train",
    "emoji_baselines:imma": "train",
    "emoji_baselines:esd": "train",
    "emoji_attack": "attack",
    "emoji_attack:dreambooth": "attack",
    "emoji_attack:textual_inversion": "attack",
    "emoji_evaluate": "evaluate",
    "emoji_benchmark:smoke": "benchmark",
}


def spec_of(name):
    file, _, variant = name.partition(":")
    return f"{CONFIGS / file}.py:{variant}"


CONFIG = {name: load_config(spec_of(name)) for name in NAMES}
FIELDS = {name: config.flatten(cfg.to_dict()) for name, cfg in CONFIG.items()}


def resolved(name, *overrides):
    """Returns (a checked config, "") or (None, why its flags are refused)."""

    def parse():
        argv = [f"--config={spec_of(name)}", *(f"--config.{o}" for o in overrides)]
        cfg, _ = cli.parse_config(argv, cli.parser("", ""), NAMES[name])
        return RESOLVE[NAMES[name]](cfg)

    return outcome(parse)


@pytest.mark.parametrize("name", NAMES)
def test_what_ships_is_accepted(name):
    assert resolved(name)[0]


TEXTS = st.text(max_size=30) | st.sampled_from(
    ["", "0", "-1", "1e400", "nan", "-inf", "true", "None", "()", "a,b", "9" * 5000]
    + ["1e-3", "2147483648", "x" * 9999, "\x1b[2J", "a\nb", "~", "/dev/null", "\0"]
)


@tries(400)
@given(st.sampled_from(sorted(NAMES)), TEXTS | st.integers().map(str), st.data())
def test_any_value_of_any_field_is_taken_or_refused(name, value, data):
    field = data.draw(st.sampled_from(sorted(FIELDS[name])))
    result, message = resolved(name, f"{field}={value}")
    assert result or "config" in message


@tries(200)
@given(
    st.sampled_from(sorted(NAMES)), st.sampled_from(["nan", "inf", "-inf"]), st.data()
)
def test_no_number_is_infinite(name, value, data):
    numbers = [f for f, v in FIELDS[name].items() if isinstance(v, (int, float))]
    field = data.draw(st.sampled_from(numbers))
    result, message = resolved(name, f"{field}={value}")
    assert result is None and f"config.{field}" in message


@tries(60)  # to look for a near name among hundreds takes a while
@given(st.sampled_from(sorted(NAMES)), st.data())
def test_a_field_with_a_letter_wrong_is_refused_with_a_name(name, data):
    field = data.draw(st.sampled_from(sorted(FIELDS[name])))
    at = data.draw(st.integers(0, len(field) - 1))
    wrong = field[:at] + data.draw(st.sampled_from("abcxyz_")) + field[at + 1 :]
    groups = {field.rpartition(".")[0] for field in FIELDS[name]}
    hypothesis.assume(wrong not in {*FIELDS[name], *groups})
    result, message = resolved(name, f"{wrong}=1")
    near = message.rpartition("did you mean config.")[2].removesuffix("?")
    assert result is None and near in FIELDS[name]


@tries(150)
@given(st.sampled_from(sorted(NAMES)), st.lists(st.text(max_size=30), min_size=1))
def test_any_flags_are_taken_or_refused(name, words):
    resolved(name, *words)


@pytest.mark.parametrize(
    "name, overrides",
    [
        ("emoji_gift", ["harmful.batch=6", "hardware.grad_accum_steps=4"]),
        ("emoji_gift", ["harmful.num_generated=3"]),  # a second source
        ("emoji_gift", ["safe.names=()"]),  # no source
        ("emoji_gift", ["safe.prompt=x"]),
        ("emoji_gift", ["safe.names=()", "safe.tfds=x"]),
        ("emoji_gift", ["gift.layers=()"]),
        ("emoji_gift", ["hardware.mesh.data=0", "hardware.mesh.fsdp=0"]),
        ("emoji_gift", ["hardware.processes.index=0"]),
        ("emoji_gift", ["samples.prompts=()"]),
        ("emoji_gift", ["method=esd"]),  # whose fields this config does not have
        ("emoji_attack:dreambooth", ["dreambooth.prior_weight=1", "prior.prompt="]),
        ("emoji_attack", ["attack=textual_inversion"]),
        ("emoji_attack", ["samples.at_steps=1,-2"]),
        ("emoji_evaluate", ["samples.num=0"]),
        ("emoji_evaluate", ["metrics.names=()"]),
        ("emoji_evaluate", ["reference_images.folder=x"]),
        ("emoji_benchmark:smoke", ["methods=()"]),
        ("emoji_benchmark:smoke", ["attacks=x"]),
    ],
)
def test_what_contradicts_itself_is_refused(name, overrides):
    assert resolved(name, *overrides)[1]


@tries(60)
@given(st.integers(1, 64), st.integers(1, 64))
def test_a_batch_divides_into_micro_batches_or_is_refused(batch, parts):
    flags = f"data.batch={batch}", f"hardware.grad_accum_steps={parts}"
    assert (resolved("emoji_attack", *flags)[0] is None) == bool(batch % parts)


@tries(60)
@given(st.text(max_size=12) | st.sampled_from(["x" * 9999, "\0", "a\nb", "~", ":"]))
def test_a_missing_config_or_model_is_refused(name):
    assert outcome(lambda: load_config(f"nowhere/{name}"))[1]
    assert outcome(lambda: load_model(f"nowhere {name}"))[1]


@pytest.mark.parametrize(
    "content",
    [
        *(b"\0", b"\xff", b"x = (", b""),
        b"def get_config(name): return {}",
        b"def get_config(name): raise ValueError('no')",
    ],
)
def test_a_config_file_that_has_no_config_is_refused(tmp_path, content):
    (tmp_path / "job.py").write_bytes(content)
    assert "job.py" in outcome(lambda: load_config(str(tmp_path / "job.py")))[1]


def test_messages_of_odd_values_are_short_lines():
    deep = []
    for _ in range(100_000):
        deep = [deep]
    for value in (deep, "x\n" * 9999, 10**4000, {"a": "x" * 9999}, "\x1b[2J", None):
        for check in (
            lambda v: errors.choice("config.x", v, ("a", "b")),
            lambda v: errors.at_least("config.x", v, 0),
            lambda v: errors.between("config.x", v, 0, 1),
        ):
            _, message = outcome(lambda check=check, value=value: check(value))
            assert message.startswith("config.x=") and len(message) < 400


PARTS = st.sampled_from(
    ["{concept}", "{a_concept}", "{style}", "{a_style}", "{{", "}}", "{", "}", "{}"]
    + ["{0}", "{concept.x}", "{concept!r}", "{style:>9}", "{style[0]}", "{x}", " a "]
)
TEMPLATES = st.lists(PARTS | st.text(max_size=5), max_size=5).map("".join)


@tries(200)
@given(TEMPLATES, st.sampled_from(["bomb", "jeans", "", "{x}"]))
def test_a_template_is_filled_or_refused(template, concept):
    spec = PairsSpec(names=("bomb",), template=template)
    if outcome(lambda: check_pairs(spec))[1]:
        with pytest.raises(ValueError):
            captions.fill(template, concept, "noto")
        return
    words = {"concept": concept, "a_concept": captions.with_article(concept)}
    words |= {"style": "noto", "a_style": "a noto"}
    expected = re.sub(
        r"\{(\w+)\}|(\{)\{|(\})\}",
        lambda m: words[m[1]] if m[1] else m[2] or m[3],
        template,
    )
    assert captions.fill(template, concept, "noto") == expected


PROMPTS = st.text(max_size=60) | st.sampled_from(
    ["", "x" * 10_000, "a " * 5000, "\U0001f525" * 200, "שלום עולם", "\u202eabc"]
    + ["\0\x01\x1b[31m", "\ud800", "<|endoftext|>", "<|startoftext|> a", "a\nb", "ﬁ①"]
)


@tries(60)
@given(st.lists(PROMPTS, min_size=1, max_size=3))
def test_any_prompt_is_padded_or_cut_to_the_models_length(tiny, prompts):
    ids = tiny.tokenize(prompts)
    start, end = tiny.tokenizer.bos_token_id, tiny.tokenizer.eos_token_id
    assert ids.shape == (len(prompts), tiny.max_length) and ids.dtype == np.int32
    assert (ids[:, 0] == start).all() and (ids[:, -1] == end).all()
    assert ids.min() >= 0 and ids.max() < tiny.text_encoder.config.vocab_size
