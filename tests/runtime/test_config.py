# SPDX-License-Identifier: Apache-2.0
"""Configs and command lines: reading, overriding, and every mistake in one line."""

import dataclasses
import json
import logging as std_logging
import math
import os
import pathlib
import subprocess
import sys

import pytest
from absl import logging
from ml_collections import ConfigDict

import gift_jax
from gift_jax import attack, train
from gift_jax.attacks import base as attacks
from gift_jax.defenses import base as defenses
from gift_jax.runtime import cli, config
from gift_jax.runtime.config import load_config, override
from gift_jax.runtime.errors import (
    NonFiniteError,
    StoppedBySignal,
    UserError,
    at_least,
    choice,
)
from gift_jax.runtime.workdir import config_diff, prepare_workdir
from gift_jax.sampling.images import Samples

ROOT = pathlib.Path(gift_jax.__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").glob("*.py"))
GIFT = str(ROOT / "configs" / "emoji_gift.py")


def make_config():
    c = ConfigDict()
    c.steps = 10
    c.keep = 2
    c.rate = 0.5
    c.word = "one"
    c.flag = True
    c.names = ("a", "b")
    c.sizes = (1, 2)
    c.group = ConfigDict({"lr": 1e-3, "batch": 4})
    return c.lock()


FILE = """
from ml_collections import ConfigDict
from gift_jax.runtime.config import with_variant

def get_config(name=""):
    c = ConfigDict(dict(kind="job", steps=10, rate=0.5, word="one", flag=True))
    c.names, c.sizes, c.nothing = ("a", "b"), (1, 2), ("",)[:0]
    c.group = ConfigDict(dict(lr=1e-3, batch=4))
    return with_variant(c, name, smoke={"steps": 2, "group.batch": 1})
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "job.py"
    path.write_text(FILE)
    return str(path)


def parse(file, *flags):
    argv = [f"--config={file}", "--workdir=w", *flags]
    return cli.parse(argv, "What it does.", "job")[0]


def refusal(call, *args):
    """The message of the UserError that a call must raise: one line."""
    with pytest.raises(UserError) as caught:
        call(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- the configs that ship ------------------------------------------------------------


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_config_loads_with_its_smoke_variant(path):
    plain, smoke = load_config(str(path)), load_config(f"{path}:smoke")
    assert plain.is_locked and smoke.is_locked
    assert plain.to_dict() != smoke.to_dict()
    assert json.loads(json.dumps(plain.to_dict()))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_config_refuses_an_unknown_variant(path):
    message = refusal(load_config, f"{path}:smok")
    assert "unknown variant 'smok'" in message and "smoke" in message


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_config_says_how_to_run_it(path):
    text = path.read_text()
    assert f"--config configs/{path.name}" in text


# --- the fields that dataclasses declare ----------------------------------------------


@dataclasses.dataclass(frozen=True)
class Part:
    size: int = config.number(2, low=1, high=4, doc="in cells")
    rate: float = config.number(0.5, above=0, doc="of growth")

    def check(self, field):
        if self.size * self.rate > 2:
            raise UserError(f"{field}.size={self.size} is too much")


@dataclasses.dataclass(frozen=True)
class Whole:
    word: str = config.choice("one", ("one", "two"), "how many")
    words: tuple[str, ...] = config.choice(("one",), ("one", "two"), "which")
    steps: tuple[int, ...] = config.numbers((), low=0, doc="when")
    names: tuple[str, ...] = config.value((), "of anything")
    part: Part = config.group(Part)
    other: Part = config.group(Part(size=3))


def test_config_of_a_dataclass_resolves_to_it_again():
    cfg = config.to_config(Whole)
    assert cfg.to_dict()["other"] == {"size": 3, "rate": 0.5}
    assert config.resolve(cfg, Whole) == Whole()
    cfg.update(words=("two", "one"), names=("a",), steps=("3", "10"))
    cfg.part.size = 4
    whole = config.resolve(json.loads(json.dumps(cfg.to_dict())), Whole)
    assert whole == Whole(
        words=("two", "one"), names=("a",), steps=(3, 10), part=Part(size=4)
    )
    assert config.resolve(cfg, Whole, part=Part(1)).part == Part(1)


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("word", "three", "config.word='three' is not one of: one, two"),
        ("words", ("one", "six"), "config.words='six' is not one of: one, two"),
        ("steps", ("1", "x"), "config.steps='x' must be whole numbers; try --config"),
        ("steps", ("-1",), "config.steps='-1' must be whole numbers"),
        ("part.size", 0, "config.part.size=0 must be at least 1; try"),
        ("part.size", 5, "config.part.size=5 must be at most 4; try"),
        ("part.rate", 0.0, "config.part.rate=0.0 must be above 0; try"),
        ("part.rate", math.nan, "config.part.rate=nan must be finite"),
        ("other.rate", 1.0, "config.other.size=3 is too much"),
    ],
)
def test_value_that_breaks_its_fields_rule_is_named(field, value, message):
    cfg = config.to_config(Whole)
    cfg.update_from_flattened_dict({field: value})
    assert message in refusal(config.resolve, cfg, Whole)


def test_missing_field_or_group_is_named():
    cfg = config.to_config(Whole)
    assert "config.none is missing" in refusal(config.resolve_group, cfg, "none", Part)
    del cfg.part.size
    assert "config.part.size is missing" in refusal(config.resolve, cfg, Whole)


def test_description_has_every_fields_value_meaning_and_rule():
    rows = dict(config.describe(Whole, config.to_config(Whole)))
    assert rows["config.word=one"] == "how many (one of one, two)"
    assert rows["config.part.size=2"] == "in cells (at least 1; at most 4)"
    assert rows["config.other.rate=0.5"] == "of growth (above 0)"
    assert len(rows) == 8


# --- the fields of every defense and attack -------------------------------------------

COMMANDS = [(train, name) for name in defenses.NAMES]
COMMANDS += [(attack, name) for name in attacks.NAMES]


def valid_config(command, name):
    """The config of a defense or an attack with a source for every group of data."""
    cfg = command.get_config(name)
    cfg.samples.prompts = ("a cat",)
    for group in ("harmful", "safe", "data", "prior", "retain"):
        if group in cfg:
            cfg[group].names = ("bomb",)
    if name == "edit_back":
        cfg.edit_back.source = "a cat"
    return cfg


def declared(cls, prefix=""):
    """Yields (path, metadata) of the fields of a dataclass and of its groups."""
    for field in dataclasses.fields(cls):
        if field.default_factory is not dataclasses.MISSING and (
            dataclasses.is_dataclass(default := field.default_factory())
        ):
            yield from declared(type(default), f"{prefix}{field.name}.")
        elif field.metadata:
            yield prefix + field.name, field.metadata


def wrong_values(old, metadata):
    """Values that break the rule of a field."""
    is_tuple = isinstance(old, tuple)
    if "choices" in metadata:
        return [("no such word",) if is_tuple else "no such word"]
    if metadata.get("low") is not None:
        too_low = [("-1",)] if is_tuple else [type(old)(metadata["low"] - 1)]
        high = metadata.get("high")
        return too_low + ([type(old)(high + 1)] if high is not None else [])
    return [] if metadata.get("above") is None else [type(old)(metadata["above"])]


@pytest.mark.parametrize("command, name", COMMANDS)
def test_every_rule_of_every_field_is_enforced(command, name):
    cfg = valid_config(command, name)
    command.resolve(cfg)
    loaded = {train: defenses, attack: attacks}[command].load(name)
    own, *others = command.field_groups(loaded, name).items()
    shared = {train: train.TrainFields, attack: attack.AttackFields}[command]
    groups = [("", shared), own, *others]
    fields = [
        (f"{group}.{path}".removeprefix("."), metadata)
        for group, cls in groups
        for path, metadata in declared(cls)
        if group != "prior"  # not read by default
        and (group, name) != ("data", "interpolation")  # nor ever
    ]
    cases = 0
    for path, metadata in fields:
        *parents, last = path.split(".")
        node = cfg
        for parent in parents:
            node = node[parent]
        old = node[last]
        for value in wrong_values(old, metadata):
            node[last] = value
            message = refusal(command.resolve, cfg)
            assert f"config.{path}" in message or f"config.{parents[0]}" in message, (
                path,
                message,
            )
            cases += 1
        node[last] = old
        assert metadata["doc"], path
    assert cases > 30
    command.resolve(cfg)


# --- reading and overriding -----------------------------------------------------------


def test_overrides_keep_the_type_of_the_field(file):
    cfg = parse(
        file,
        "--config.steps=20",
        "--config.rate=1",
        "--config.word=two words=2",
        "--config.flag=false",
        "--config.names=(x, y,z)",
        "--config.sizes=3,4",
        "--config.nothing=q",
        "--config.group.lr=1e-5",
    )
    assert cfg.to_dict() == {
        "kind": "job",
        "steps": 20,
        "rate": 1.0,
        "word": "two words=2",
        "flag": False,
        "names": ("x", "y", "z"),
        "sizes": (3, 4),
        "nothing": ("q",),
        "group": {"lr": 1e-5, "batch": 4},
    }
    assert isinstance(cfg.rate, float)
    assert parse(file, "--config.names=()").names == ()


TEXTS = (
    *("a photo of a dog, oil painting", "(red:1.3), {a} <b>", 'it\'s "so"', "a\nb"),
    *("('a', 'b')", "猫、犬", "{'a': 1}", " a ", "5", "null", "a]", "a=b, c=d", "-1"),
)


@pytest.mark.parametrize("text", TEXTS)
def test_prompts_are_texts_whatever_they_hold(text):
    cfg = ConfigDict({"samples": {"prompts": ("a", "b")}}).lock()
    override(cfg, f"samples.prompts={text}")
    assert cfg.samples.prompts == (text,)
    several = (text, "[b]", "a, b")
    for listed in (json.dumps(several), json.dumps(several, ensure_ascii=False)):
        override(cfg, f"samples.prompts={listed}")
        assert cfg.samples.prompts == several
    for nothing in ("", "()", "[]"):
        override(cfg, f"samples.prompts={nothing}")
        assert cfg.samples.prompts == ()


@pytest.mark.parametrize("text", ["[a] cat", '["a", 5]', '["a"', "[red|blue] car"])
def test_prompt_that_starts_as_a_list_is_named(text):
    cfg = ConfigDict({"samples": {"prompts": ("a",)}}).lock()
    with pytest.raises(
        UserError, match=r"config.samples.prompts='.* write --config.sa"
    ):
        override(cfg, f"samples.prompts={text}")
    override(cfg, f"samples.prompts={json.dumps([text])}")
    assert cfg.samples.prompts == (text,)


def test_one_text_in_a_config_file_is_one_prompt():
    cfg = config.to_config(Samples).to_dict() | {"prompts": "a cat, 4k"}
    assert config.resolve(cfg, Samples).prompts == ("a cat, 4k",)


def test_a_list_may_hold_names_with_commas(file):
    cfg = parse(file, '--config.names=["x, y", "[z]"]')
    assert cfg.names == ("x, y", "[z]")
    assert parse(file, "--config.names=[x,y]").names == ("x", "y")


def test_help_shows_prompts_as_they_are_given():
    cfg = ConfigDict({"prompts": ("a, b", 'say "c"')})
    ((row, meaning), *_) = config.describe(Samples, cfg, "config.samples")
    assert row == """config.samples.prompts='["a, b", "say \\"c\\""]'"""
    assert '\'["a cat, 4k", "a dog"]\'' in meaning
    read = ConfigDict({"samples": {"prompts": ()}}).lock()
    override(read, row.removeprefix("config.").replace("'", ""))
    assert read.samples.prompts == cfg.prompts


def test_variant_then_overrides(file):
    assert parse(f"{file}:smoke").to_dict()["group"]["batch"] == 1
    cfg = parse(f"{file}:smoke", "--config.steps=7")
    assert (cfg.steps, cfg.group.batch) == (7, 1)


def test_flags_may_be_two_words(file):
    argv = ["--workdir", "w", "--config", file, "--config.steps=3"]
    cfg, workdir = cli.parse(argv, "", "job")
    assert (cfg.steps, workdir) == (3, pathlib.Path("w"))


@pytest.mark.parametrize(
    "flag, message",
    [
        ("--config.stepz=3", "config.stepz is no field.*did you mean config.steps?"),
        ("--config.group.lrr=3", "did you mean config.group.lr?"),
        ("--config.steps.x=3", "config.steps.x is no field"),
        ("--config.qqqqqqqq=3", "is no field of this config; fields: flag, group"),
        ("--config.steps=many", "config.steps='many' must be of type int"),
        ("--config.steps=1.5", "config.steps='1.5' must be of type int"),
        ("--config.rate=fast", "config.rate='fast' must be of type float"),
        ("--config.flag=perhaps", "config.flag='perhaps' must be of type bool"),
        ("--config.sizes=1,b", "config.sizes='1,b' must be of type tuple"),
        ("--config.group=3", "config.group='3' must be"),
        ("--config.steps", "--config.steps needs a value"),
        ("--stepz=3", "unrecognized arguments: --stepz=3"),
    ],
)
def test_wrong_override_is_named(file, flag, message):
    with pytest.raises(UserError, match=message):
        parse(file, flag)
    refusal(parse, file, flag)


def test_wrong_config_file_is_named(file, tmp_path):
    assert "nowhere.py is no file" in refusal(load_config, str(tmp_path / "nowhere.py"))
    empty = tmp_path / "empty.py"
    empty.write_text("")
    assert "defines no get_config" in refusal(load_config, str(empty))
    text = tmp_path / "a.txt"
    text.write_text("")
    assert "is no Python file" in refusal(load_config, str(text))
    broken = tmp_path / "broken.py"
    broken.write_text("def get_config(:\n")
    assert "broken.py" in refusal(load_config, str(broken))
    assert "choices: smoke" in refusal(load_config, f"{file}:fast")
    assert "did you mean configs/emoji_gift_gate.py?" in refusal(
        load_config, "configs/emoji_gift_gat.py"
    )


@pytest.mark.parametrize(
    "line, word", [("c.harmful.update(promt='a')", "promt"), ("c.stepz = 3", "stepz")]
)
def test_unknown_field_in_a_config_file_is_named_with_its_line(
    tmp_path, monkeypatch, line, word
):
    path = tmp_path / "mine.py"
    head = f"from gift_jax.runtime.config import load_config\nc = load_config({GIFT!r})"
    path.write_text(f"{head}\ndef get_config(_=''):\n    {line}\n    return c\n")
    message = refusal(load_config, str(path))
    assert f"--config={path}, line 4: " in message and word in message
    monkeypatch.chdir(tmp_path)
    message = refusal(load_config, "mine.py")
    assert "--config=mine.py, line 4: " in message and word in message


@pytest.mark.parametrize(
    "program, other, owner",
    [
        ("train", "emoji_attack", "attack"),
        ("attack", "emoji_gift", "train"),
        ("attack", "emoji_benchmark", "benchmark"),
        ("benchmark", "sd15_object", "train"),
        ("pretrain", "emoji_gift", "train"),
    ],
)
def test_config_of_another_command_is_named(program, other, owner):
    path = str(ROOT / "configs" / f"{other}.py")
    argv = [f"--config={path}", "--workdir=w"]
    text = refusal(cli.parse, argv, "", program)
    assert f"no config of gift_jax.{program}" in text
    assert f"it is one of gift_jax.{owner}" in text
    assert cli.parse(argv, "", owner)[0] == load_config(path)


def test_missing_flags_are_named(file):
    assert "--workdir" in refusal(cli.parse, [f"--config={file}"], "", "job")
    assert "--config" in refusal(cli.parse, ["--workdir=w"], "", "job")


def test_help_lists_every_field(file, capsys):
    with pytest.raises(SystemExit) as done:
        cli.parse(["--config", file, "--help"], "What it does.", "job")
    assert done.value.code == 0
    text = capsys.readouterr().out
    for word in ("What it does.", "python -m gift_jax.job", "--workdir", "resumes"):
        assert word in text
    for field in ("steps", "rate", "nothing", '"lr": 0.001'):
        assert field in text
    with pytest.raises(SystemExit) as done:
        cli.parse(["--help"], "What it does.", "job")
    assert done.value.code == 0


def test_choice_and_at_least_name_the_field():
    assert choice("config.x", "a", ("a", "b")) == "a"
    message = refusal(choice, "config.x", "c", ("a", "b"))
    assert message.startswith("config.x='c' is not one of") and "a, b" in message
    at_least("config.n", 0, 0)
    assert "config.n=-1 must be at least 0" in refusal(at_least, "config.n", -1, 0)
    assert "nan must be" in refusal(at_least, "config.n", float("nan"), 0)


# --- the run's folder -----------------------------------------------------------------


def test_workdir_holds_the_whole_config(tmp_path):
    prepare_workdir(make_config(), tmp_path / "a" / "b", base="123")
    saved = json.loads((tmp_path / "a" / "b" / "config.json").read_text())
    assert saved["base_sha256"] == "123"
    assert saved["group"] == {"lr": 1e-3, "batch": 4}
    assert (tmp_path / "a" / "b" / "log.txt").exists()


def test_workdir_of_another_config_is_refused(tmp_path):
    prepare_workdir(make_config(), tmp_path, base="123")
    cfg = make_config()
    cfg.group.lr = 2e-3
    before = (tmp_path / "config.json").read_text()
    message = refusal(prepare_workdir, cfg, tmp_path, "123")
    assert "another config (group.lr was 0.001, is 0.002)" in message
    message = refusal(prepare_workdir, make_config(), tmp_path, "456")
    assert "base_sha256 was 123, is 456" in message
    assert (tmp_path / "config.json").read_text() == before


def test_workdir_goes_on_with_the_same_model_in_another_place(tmp_path):
    first, moved = make_config(), make_config()
    for cfg, where in ((first, "runs/a/export"), (moved, "/elsewhere/a/export")):
        with cfg.unlocked():
            cfg.model = where
    prepare_workdir(first, tmp_path, base="123")
    prepare_workdir(moved, tmp_path, base="123")
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["model"] == "/elsewhere/a/export"
    message = refusal(prepare_workdir, first, tmp_path, "456")
    assert "base_sha256 was 123, is 456; model was /elsewhere/a/export" in message
    assert "model was" in refusal(prepare_workdir, first, tmp_path)


def test_workdir_may_go_on_for_more_steps(tmp_path):
    prepare_workdir(make_config(), tmp_path)
    cfg = make_config()
    cfg.steps = 20
    prepare_workdir(cfg, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["steps"] == 20


def test_steps_of_a_group_are_no_pace(tmp_path):
    first, second = make_config(), make_config()
    for cfg, steps in ((first, 25), (second, 50)):
        with cfg.unlocked():
            cfg.samples = ConfigDict({"steps": steps})
    prepare_workdir(first, tmp_path)
    message = refusal(prepare_workdir, second, tmp_path)
    assert "samples.steps was 25, is 50" in message


def test_workdir_that_cannot_be_used_is_named(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    message = refusal(prepare_workdir, make_config(), file)
    assert f"--workdir={file} cannot be written" in message
    (tmp_path / "config.json").write_text("{")
    message = refusal(prepare_workdir, make_config(), tmp_path)
    assert "config.json" in message


def test_two_runs_in_one_process_keep_their_logs_apart(tmp_path):
    before = logging.get_verbosity()
    logging.set_verbosity(logging.INFO)
    try:
        for name in ("first", "second"):
            prepare_workdir(make_config(), tmp_path / name)
            logging.info("this is %s", name)
    finally:
        logging.set_verbosity(before)
    logs = (tmp_path / name / "log.txt" for name in ("first", "second"))
    first, second = (log.read_text() for log in logs)
    assert "this is first" in first and "this is second" not in first
    assert "this is second" in second and "this is first" not in second


# --- the command lines' frame ---------------------------------------------------------


def test_libraries_are_quiet_in_a_clone_of_any_name():
    """A virtual environment may lie in a folder that is named as the package is."""
    package = pathlib.Path(gift_jax.__file__).parent

    def shown(path, level=std_logging.INFO):
        record = std_logging.LogRecord("absl", level, str(path), 1, "text", (), None)
        return cli._ours_or_serious(record)

    library = pathlib.Path("/home/me/gift_jax/.venv/lib/orbax/checkpoint.py")
    assert shown(package / "training" / "loop.py")
    assert not shown(library) and not shown(package.parent / ".venv/lib/orbax/a.py")
    assert shown(library, std_logging.WARNING)


@pytest.mark.parametrize(
    "event, code",
    [
        (UserError("config.x=3 is wrong"), 2),
        (StoppedBySignal(15), 143),
        (StoppedBySignal(2), 130),
        (NonFiniteError("step 3: loss is nan"), 3),
        (KeyboardInterrupt(), 130),
    ],
)
def test_exit_codes(monkeypatch, capsys, event, code):
    monkeypatch.setattr(cli, "log_to_stderr", lambda: None)

    def main():
        raise event

    with pytest.raises(SystemExit) as done:
        cli.run_main(main)
    assert done.value.code == code
    error = capsys.readouterr().err
    assert error.count("\n") <= 1 and str(event) in error


def test_exit_code_of_success_and_of_a_bug(monkeypatch):
    monkeypatch.setattr(cli, "log_to_stderr", lambda: None)
    with pytest.raises(SystemExit) as done:
        cli.run_main(lambda: 0)
    assert done.value.code == 0
    with pytest.raises(ZeroDivisionError):  # a bug keeps its traceback
        cli.run_main(lambda: 1 // 0)


def process(tmp_path, *argv):
    return subprocess.run(
        [sys.executable, "-m", *argv],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )


def test_mistake_ends_a_process_with_one_line_and_exit_code_2(tmp_path):
    done = process(
        tmp_path,
        "gift_jax.train",
        f"--config={GIFT}",
        "--config.modle=x",
        "--workdir=w",
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "config.modle is no field of this config; did you mean config.model?" in (
        done.stderr
    )
    assert done.stdout == ""
    assert not (tmp_path / "w").exists()


def test_a_resumed_run_may_change_its_length_its_pace_and_the_hardware():
    old = {
        "steps": 10,
        "checkpoints": {"keep": 2},
        "hardware": {"mesh": {"data": 0}},
        "lr": 1e-3,
    }
    old["generation"] = {"steps": 25}
    new = json.loads(json.dumps(old))
    new["steps"], new["checkpoints"]["keep"] = 20, 3
    new["hardware"]["mesh"]["data"] = 2
    assert not config_diff(old, new)
    assert config_diff(old, new, finished=True) == "steps was 10, is 20"
    new["lr"], new["generation"]["steps"] = 2e-3, 50
    assert config_diff(old, new) == (
        "generation.steps was 25, is 50; lr was 0.001, is 0.002"
    )
