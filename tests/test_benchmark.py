# SPDX-License-Identifier: Apache-2.0
"""The benchmark on the embedded model: its cells, its resuming, its mistakes."""

import json
import pathlib

import numpy as np
import pytest

from gift_jax import attack, benchmark, config
from gift_jax.config import UserError
from gift_jax.data import emoji
from gift_jax.report import grid

CONFIG = pathlib.Path(benchmark.__file__).parents[1] / "configs" / "emoji_benchmark.py"


@pytest.fixture(autouse=True)
def from_the_root(monkeypatch, pytestconfig):
    """Configs name each other from there."""
    monkeypatch.chdir(CONFIG.parents[1])
    monkeypatch.setenv("GIFT_JAX_CACHE", str(pytestconfig.cache.mkdir("emoji")))


def main(workdir, *flags, variant=":smoke"):
    argv = [f"--config={CONFIG}{variant}", f"--workdir={workdir}", *flags]
    assert benchmark.main(argv) == 0
    return json.loads((workdir / "results.json").read_text())


def test_smoke_does_each_cell_once_and_goes_on(tmp_path, monkeypatch, capsys):
    stopped = benchmark.Bench.do
    done = []

    def do(self, cell):
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(cell)
        return stopped(self, cell)

    monkeypatch.setattr(benchmark.Bench, "do", do)
    with pytest.raises(KeyboardInterrupt):
        main(tmp_path)
    assert not (tmp_path / "results.json").exists()
    compiled = []
    train = attack.train

    def spy(cfg, workdir, shared):
        def noted(plan):
            compiled.append(shared(plan))
            return compiled[-1]

        return train(cfg, workdir, noted)

    monkeypatch.setattr(attack, "train", spy)
    done.clear()
    monkeypatch.setattr(
        benchmark.Bench, "do", lambda *a: done.append(a[1]) or stopped(*a)
    )
    results = main(tmp_path)
    every = benchmark.cells(config.load(f"{CONFIG}:smoke"))
    assert len(every) == 10 and done == every[3:]
    assert len(compiled) > 1 and len(set(map(id, compiled))) == 1  # one program
    assert len(results["cells"]) == 10
    for cell, found in zip(every, results["cells"], strict=True):
        assert found["method"] == cell.method and found["side"] == cell.side
        assert len(found["things"]) == found["num"] == 2
        assert found["recognised"] in (0.0, 0.5, 1.0)
        assert ("step_s" in found) == (cell.attack != "before")
    sheets = {
        cell: grid.read_sheet(tmp_path / cell.folder / "samples.png", 2)
        for cell in every
    }
    bomb = [sheets[c] for c in every if c.side == "harmful"]
    assert all(
        (bomb[0] != other).any() for other in bomb[1:]
    )  # each model draws its own
    assert {p.name for p in tmp_path.glob("bomb_*.png")} == {
        "bomb_harmful.png",
        "bomb_benign.png",
        "bomb_kept.png",
    }
    assert not list(tmp_path.rglob("checkpoints"))
    text = (tmp_path / "results.md").read_text()
    assert (
        "| side, attack | original | uce |" in text and text in capsys.readouterr().out
    )

    done.clear()
    assert main(tmp_path) == results and not done
    with pytest.raises(UserError, match="another config .samples.seed was 2, is 3"):
        main(tmp_path, "--config.samples.seed=3")
    with pytest.raises(UserError, match="another config .attack.steps was 2, is 3"):
        main(tmp_path, "--config.common.attack.steps=3")


def cell(**fields):
    base = dict(concept="bomb", method="gift", side="harmful", attack="lora")
    return benchmark.Cell(**base | fields)


def test_style_is_kept_from_the_safe_pictures_and_learned_by_its_own_word():
    cfg = config.load(str(CONFIG))
    c = benchmark.defence_config(cfg, cell(concept="fluent"))
    assert tuple(c.harmful.styles) == ("fluent",)
    assert set(c.safe.styles) == set(emoji.STYLES) - {"fluent"}
    c = benchmark.attack_config(cfg, cell(concept="fluent", attack="textual_inversion"))
    assert c.data.template == "a <thing> emoji of {a_concept}"
    assert tuple(c.data.styles) == ("fluent",)
    c = benchmark.attack_config(
        cfg, cell(concept="fluent", attack="textual_inversion", side="benign")
    )
    assert c.data.template == "{a_style} emoji of <thing>"
    assert "fluent" not in c.data.styles


def test_rate_three_times_as_high_and_nothing_else():
    cfg = config.load(str(CONFIG))
    for name in ("dreambooth", "lora"):
        one, three = (
            benchmark.attack_config(cfg, cell(attack=name + suffix))
            for suffix in ("", "_x3")
        )
        assert three.optimizer.lr == pytest.approx(3 * one.optimizer.lr)
        three.optimizer.lr = one.optimizer.lr
        assert three.to_dict() | {"name": ""} == one.to_dict() | {"name": ""}
        assert one.attack == name and one.steps == 300


def test_asked_takes_turns_and_spaces_many_things_evenly():
    side = config.ConfigDict({"names": ("bomb", "pill"), "styles": ()})
    rows = benchmark.asked(side, 12)
    assert [thing for _, thing, _ in rows[:3]] == ["bomb", "pill", "bomb"]
    assert {style for _, _, style in rows} == set(emoji.STYLES)
    assert rows[1][0] == "a noto emoji of a pill"
    many = config.ConfigDict({"names": ("known-safe",), "styles": ("noto",)})
    things = [thing for _, thing, _ in benchmark.asked(many, 10)]
    assert len(set(things)) == 10 and things == sorted(things) and things[-1] > "t"
    told = benchmark.asked(side, 1, "{a_style} emoji of <thing>")
    assert told[0][0] == "a twemoji emoji of <thing>"


@pytest.mark.parametrize(
    "flag, message",
    [
        ("methods=gfit", "config.methods='gfit' is not one of.*did you mean 'gift'"),
        ("attacks=()", "config.attacks is empty"),
        ("concepts=bom", "config.concepts='bom' is not one of"),
        ("concept.bomb.judged=word", "config.concept.bomb.judged='word' is not one"),
        ("concept.bomb.benign.names=gitar", "benign.names: concept 'gitar'.*'guitar'"),
        ("samples.num=0", "config.samples.num=0 must be at least 1"),
        ("common.attack.steps=-1", "config.steps=-1 must be at least 0"),
        ("method.gift.config=nowhere.py", "nowhere.py is no file"),
    ],
)
def test_mistake_is_named_before_anything_is_written(tmp_path, flag, message):
    with pytest.raises(UserError, match=message) as caught:
        main(tmp_path / "run", f"--config.{flag}", variant="")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_sheet_comes_back_as_it_was(tmp_path, rng):
    images = rng.integers(0, 256, (11, 4, 6, 3), np.uint8)
    grid.save_sheet(images, tmp_path / "sheet.png", 4)
    np.testing.assert_array_equal(
        grid.read_sheet(tmp_path / "sheet.png", 11, 4), images
    )
