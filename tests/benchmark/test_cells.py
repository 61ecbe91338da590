# SPDX-License-Identifier: Apache-2.0
"""The benchmark on the embedded model: its cells, its resuming, its mistakes."""

import json
import pathlib

import jax
import light_copy
import numpy as np
import pytest

import gift_jax
from gift_jax import attack
from gift_jax.benchmark import __main__ as benchmark_main
from gift_jax.benchmark import cells as benchmark_cells
from gift_jax.benchmark import matrix
from gift_jax.runtime.config import load_config
from gift_jax.runtime.errors import UserError
from gift_jax.runtime.versions import versions
from gift_jax.sampling import grid
from gift_jax.training import loop

CONFIG = pathlib.Path(gift_jax.__file__).parents[1] / "configs" / "emoji_benchmark.py"


@pytest.fixture(autouse=True)
def from_the_root(monkeypatch, pytestconfig):
    """Configs name each other from there."""
    monkeypatch.chdir(CONFIG.parents[1])
    monkeypatch.setenv("GIFT_JAX_CACHE", str(pytestconfig.cache.mkdir("emoji")))


def main(workdir, *flags, variant=":smoke"):
    argv = [f"--config={CONFIG}{variant}", f"--workdir={workdir}", *flags]
    assert benchmark_main.main(argv) == 0
    return json.loads((workdir / "results.json").read_text())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("benchmark")


@pytest.fixture
def smoke(folder, monkeypatch, capsys):
    """(results, cells done after an interruption, steps used, what was printed)."""
    if not (folder / "results.json").exists():
        _interrupted(folder, monkeypatch)
    done, compiled = [], []
    do, train = benchmark_cells.Bench.do, attack.train

    def spy(cfg, workdir, *, shared, **others):
        def noted(plan):
            compiled.append(shared(plan))
            return compiled[-1]

        return train(cfg, workdir, shared=noted, **others)

    monkeypatch.setattr(attack, "train", spy)
    monkeypatch.setattr(
        benchmark_cells.Bench, "do", lambda *a: done.append(a[1]) or do(*a)
    )
    return main(folder), done, compiled, capsys.readouterr().out


def _interrupted(folder, monkeypatch):
    """Leaves three cells done, and a fourth stopped after its first look."""
    with monkeypatch.context() as patch:
        judged, drawn = benchmark_cells.Bench._judged, []

        def stop(self, cell, model, step):
            if len(drawn) == 4:
                raise KeyboardInterrupt
            drawn.append((cell, step))
            return judged(self, cell, model, step)

        patch.setattr(benchmark_cells.Bench, "_judged", stop)
        with pytest.raises(KeyboardInterrupt):
            main(folder)
    assert [step for _, step in drawn] == [0, 1, 2, 0]
    assert not (folder / "results.json").exists()


def test_each_cell_is_done_once_and_looked_at_along_the_way(smoke, folder):
    results, done, compiled, out = smoke
    every = matrix.Matrix(load_config(f"{CONFIG}:smoke")).cells
    assert len(every) == len(results["cells"]) == 10
    assert done == every[3:]
    assert len(compiled) > 1 and len(set(map(id, compiled))) == 1  # one program
    for cell, found in zip(every, results["cells"], strict=True):
        assert found["method"] == cell.method and found["side"] == cell.side
        steps = [0] if cell.attack == "before" else [1, 2]
        assert [point["step"] for point in found["points"]] == steps
        assert ("step_s" in found) == (cell.attack != "before")
        for point in found["points"]:
            assert (
                len(point["things"])
                == len(point["samples"]["judge_image_similarity"])
                == 2
            )
            assert point["values"]["classifier_accuracy"] in (0.0, 0.5, 1.0)
            assert grid.read_sheet(folder / point["sheet"], 2).shape == (2, 64, 64, 3)
    sheets = [
        grid.read_sheet(folder / found["points"][-1]["sheet"], 2)
        for found in results["cells"]
        if found["side"] == "harmful"
    ]
    assert all((sheets[0] != other).any() for other in sheets[1:])  # models differ
    assert not list(folder.rglob("checkpoints")) + list(folder.rglob("points"))
    for side in matrix.SIDES:
        assert (folder / f"bomb_{side}.png").exists()


def test_results_say_how_they_were_made_and_what_was_taken(smoke, folder):
    results, _, _, _ = smoke
    text = (folder / "results.md").read_text()
    assert "| side, attack | original | uce |" in text
    assert results["command"].startswith("python -m gift_jax.benchmark --config=")
    how = results["metrics"]["judge_image_similarity"]["how"]
    assert {"backbone", "version", "resolution"} <= set(how)
    assert results["config"]["samples"]["seed"] == 2
    assert results["versions"]["jax"] == jax.__version__
    assert results["versions"]["device"] == "cpu" == results["cells"][0]["device"]
    assert {(r["method"], r["metric"], r["over"]) for r in results["summary"]} == {
        ("uce", metric, over)
        for metric in ("classifier_accuracy", "judge_image_similarity")
        for over in ("mean", "peak", "final")
    }
    by = {(c["method"], c["side"], c["attack"]): c for c in results["cells"]}
    arms = [
        by[method, "harmful", "lora"]["points"][-1]["values"]["judge_image_similarity"]
        for method in ("original", "uce")
    ]
    (row,) = (
        r
        for r in results["summary"]
        if r["metric"] == "judge_image_similarity" and r["over"] == "final"
    )
    assert arms[0] != arms[1] and arms[0] > 0
    expected = 1 - max(0.0, arms[1]) / arms[0]
    assert row["harmful"]["value"] == pytest.approx(expected, abs=1e-4)


def test_versions_and_devices_of_every_cell_are_told_together():
    cells = [
        {"device": "cpu", "versions": {"jax": "1"}},
        {"device": "NVIDIA H100", "versions": {"jax": "2"}},
        {},  # of a run from before cells said it
    ]
    told = benchmark_cells._collect_versions(cells)
    assert told == {"jax": "1, 2", "device": "NVIDIA H100, cpu"}
    assert benchmark_cells._collect_versions([{}]) == versions()


def test_same_command_does_nothing_more_and_other_settings_are_refused(smoke, folder):
    results, _, _, _ = smoke
    (left,) = folder.glob("cells/bomb/uce/harmful/lora/name_0")
    (left / "checkpoints" / "2").mkdir(parents=True)  # killed after cell.json
    again = main(folder)
    assert again == results and not (left / "checkpoints").exists()
    for flag, told in (
        ("samples.seed=3", "samples.seed was 2, is 3"),
        ("common.attack.steps=3", "attack.steps was 2, is 3"),
        ("metrics.names=sharpness", "metrics.names was"),
    ):
        with pytest.raises(UserError, match=f"another config .*{told}"):
            main(folder, f"--config.{flag}")


def test_light_copy_needs_nothing_done_again(smoke, folder, tmp_path, monkeypatch):
    results, _, _, _ = smoke
    assert light_copy.copy(folder, tmp_path, 1) == len(results["cells"])
    assert not (tmp_path / "defences").exists() and not list(tmp_path.rglob("*.png"))
    monkeypatch.setattr(
        benchmark_cells.Bench, "do", lambda *a: pytest.fail("done again")
    )
    again = main(tmp_path)
    for cell, kept in zip(results["cells"], again["cells"], strict=True):
        for point, other in zip(cell["points"], kept["points"], strict=True):
            old, new = folder / point.pop("sheet"), tmp_path / other.pop("sheet")
            assert new.suffix == ".webp" and point == other
            old, new = (grid.read_sheet(path, 2).astype(int) for path in (old, new))
            assert np.abs(old[0] - new[0]).mean() < 8 < np.abs(old[1] - new[1]).mean()
            assert new[1].mean() > 254  # the second was left out


def test_what_there_is_to_do_is_counted_first():
    jobs = matrix.Matrix(load_config(f"{CONFIG}:smoke"))
    told = benchmark_cells.describe_workload(jobs, jobs.cells)
    # UCE takes none; lora on two models and two sides, 2 steps each, two looks; and
    # six looks before
    assert told == "0 steps of defence, 8 of attack, 28 pictures to draw"


def test_shared_step_takes_the_rate_from_its_state():
    jobs = matrix.Matrix(load_config(str(CONFIG)))
    bench, plans = benchmark_cells.Bench(jobs, pathlib.Path("nowhere")), []

    class Plan:
        def __init__(self):
            self.step = lambda state, frozen, batch, key: (state, {})
            plans.append(self)

    def step_of(attack_name):
        cell = matrix.Cell("bomb", "gift", "harmful", attack_name, "name")
        return bench._shared(jobs.attack_config(cell))(Plan())

    assert step_of("lora") is step_of("lora_x3")
    assert step_of("lora") is not step_of("dreambooth")
    assert loop.compile_step(step_of("lora")) is step_of("lora")


def test_mistake_is_named_before_anything_is_written(tmp_path):
    with pytest.raises(UserError, match="did you mean 'gift'") as caught:
        main(tmp_path / "run", "--config.methods=gfit", variant="")
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="config.metrics.names='x' is not one of"):
        main(tmp_path / "run", "--config.metrics.names=x", variant="")
    assert not (tmp_path / "run").exists()


def test_sheet_comes_back_as_it_was(tmp_path, rng):
    images = rng.integers(0, 256, (11, 4, 6, 3), "uint8")
    grid.save_sheet(images, tmp_path / "sheet.png", 4)
    assert (grid.read_sheet(tmp_path / "sheet.png", 11, 4) == images).all()
