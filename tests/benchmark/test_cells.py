# SPDX-License-Identifier: Apache-2.0
"""The benchmark on the embedded model: its cells, its resuming, its mistakes."""

import json
import pathlib

import jax
import pytest

import gift_jax
from gift_jax import attack
from gift_jax.benchmark import __main__ as benchmark_main
from gift_jax.benchmark import cells, evaluation, matrix, results, summary, workload
from gift_jax.report import publish
from gift_jax.report.results import load_all
from gift_jax.runtime.config import load_config
from gift_jax.runtime.errors import UserError
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
def smoke(folder, monkeypatch):
    """(results, cells that ran after an interruption, steps that they took)."""
    if not (folder / "results.json").exists():
        _interrupt(folder, monkeypatch)
    ran, compiled = [], []
    run_cell, train = cells.Bench.run_cell, attack.train

    def spy(cfg, workdir, *, share, **others):
        def note(plan):
            compiled.append(share(plan))
            return compiled[-1]

        return train(cfg, workdir, share=note, **others)

    monkeypatch.setattr(attack, "train", spy)
    monkeypatch.setattr(
        cells.Bench, "run_cell", lambda *a: ran.append(a[1]) or run_cell(*a)
    )
    return main(folder), ran, compiled


def _interrupt(folder, monkeypatch):
    """Leaves three cells done, and a fourth stopped after its first point."""
    with monkeypatch.context() as patch:
        evaluate, points = evaluation.Evaluator.evaluate, []

        def stop(self, cell, model, step):
            if len(points) == 4:
                raise KeyboardInterrupt
            points.append((cell, step))
            return evaluate(self, cell, model, step)

        patch.setattr(evaluation.Evaluator, "evaluate", stop)
        with pytest.raises(KeyboardInterrupt):
            main(folder)
    assert [step for _, step in points] == [0, 1, 2, 0]
    assert not (folder / "results.json").exists()


def test_each_cell_runs_once_and_is_evaluated_along_the_way(smoke, folder):
    data, ran, compiled = smoke
    expected = matrix.Matrix(load_config(f"{CONFIG}:smoke")).cells
    assert len(expected) == len(data["cells"]) == 10
    assert ran == expected[3:]
    assert len(compiled) > 1 and len(set(map(id, compiled))) == 1  # one program
    for cell, result in zip(expected, data["cells"], strict=True):
        assert result["method"] == cell.method and result["side"] == cell.side
        steps = [1, 2] if cell.is_attacked else [0]
        assert [point["step"] for point in result["points"]] == steps
        assert ("step_s" in result) == cell.is_attacked
        full = json.loads((folder / cell.folder / "cell.json").read_text())
        for point, own in zip(result["points"], full["points"], strict=True):
            assert point.items() <= own.items() and "samples" not in point
            assert len(own["labels"]["concept"]) == 2
            assert len(own["samples"]["judge_image_similarity"]) == 2
            assert point["values"]["classifier_accuracy"] in (0.0, 0.5, 1.0)
            assert grid.read_sheet(folder / point["sheet"], 2).shape == (2, 64, 64, 3)
    sheets = [
        grid.read_sheet(folder / result["points"][-1]["sheet"], 2)
        for result in data["cells"]
        if result["side"] == summary.HARMFUL
    ]
    assert all((sheets[0] != other).any() for other in sheets[1:])  # models differ
    assert not list(folder.rglob("checkpoints")) + list(folder.rglob("points"))
    for side in summary.SIDES:
        assert (folder / f"bomb_{side}.png").exists()


def test_results_name_their_origin_and_hold_gap_ratios(smoke, folder):
    data, _, _ = smoke
    assert "| side, attack | original | uce |" in (folder / "results.md").read_text()
    assert data["command"].startswith("python -m gift_jax.benchmark --config=")
    provenance = data["metrics"]["judge_image_similarity"]["provenance"]
    assert {"backbone", "version", "resolution"} <= set(provenance)
    assert data["config"]["samples"]["seed"] == 2
    assert data["versions"]["jax"] == jax.__version__
    assert data["versions"]["device"] == "cpu" == data["cells"][0]["device"]
    assert "\n" not in (folder / "results.json").read_text().strip()  # compact
    by = {(c["method"], c["side"], c["attack"]): c for c in data["cells"]}
    arms = [
        by[method, "harmful", "lora"]["points"][-1]["values"]["judge_image_similarity"]
        for method in ("original", "uce")
    ]
    (row,) = (
        row
        for row in data["summary"]
        if (row["metric"], row["over"]) == ("judge_image_similarity", "final")
    )
    assert arms[0] != arms[1] and arms[0] > 0
    expected = 1 - max(0.0, arms[1]) / arms[0]
    assert row["harmful"]["value"] == pytest.approx(expected, abs=1e-4)


def test_finished_benchmark_is_published(smoke, folder, tmp_path):
    paths = publish.publish(load_all([str(folder)])[0], tmp_path)
    names = [path.name for path in paths]
    assert names == [
        *("config.json", "grid.webp", "summary.json", "table.md"),
        *("tradeoff.png", "trajectories.png"),
    ]
    again = load_all([str(tmp_path)])[0].data
    assert again["summary"] == smoke[0]["summary"]


def test_versions_and_devices_of_all_cells_are_joined():
    runs = [
        {"device": "cpu", "versions": {"jax": "1"}},
        {"device": "NVIDIA H100", "versions": {"jax": "2"}},
    ]
    expected = {"jax": "1, 2", "device": "NVIDIA H100, cpu"}
    assert results._collect_versions(runs) == expected


def test_same_command_runs_nothing_again_and_other_settings_are_refused(smoke, folder):
    data, _, _ = smoke
    (left,) = folder.glob("cells/bomb/uce/harmful/lora/name_0")
    (left / "checkpoints" / "2").mkdir(parents=True)  # killed after cell.json
    assert main(folder) == data and not (left / "checkpoints").exists()
    for flag, change in (
        ("samples.seed=3", "samples.seed was 2, is 3"),
        ("shared_overrides.attack.steps=3", "attack.steps was 2, is 3"),
        ("metrics.names=sharpness", "metrics.names was"),
    ):
        with pytest.raises(UserError, match=f"another config .*{change}"):
            main(folder, f"--config.{flag}")


def test_workload_counts_steps_and_images():
    jobs = matrix.Matrix(load_config(f"{CONFIG}:smoke"))
    # UCE takes no steps; lora on two models and two sides, 2 steps each, two points;
    # and six points before
    expected = "0 steps of defense, 8 of attack, 28 images to draw"
    assert workload.describe(jobs, jobs.cells) == expected


def test_shared_step_takes_the_rate_from_its_state():
    jobs = matrix.Matrix(load_config(str(CONFIG)))
    bench = cells.Bench(jobs, pathlib.Path("nowhere"))

    class Plan:
        def __init__(self):
            self.step = lambda state, frozen, batch, key: (state, {})

    def step_of(name):
        cell = matrix.Cell("bomb", "gift", "harmful", name, "name")
        return bench._shared_step(jobs.attack_config(cell))(Plan())

    assert step_of("lora") is step_of("lora_x3")
    assert step_of("lora") is not step_of("dreambooth")
    assert loop.compile_step(step_of("lora")) is step_of("lora")


def test_sheet_comes_back_as_it_was(tmp_path, rng):
    images = rng.integers(0, 256, (11, 4, 6, 3), "uint8")
    grid.save_sheet(images, tmp_path / "sheet.png", 4)
    assert (grid.read_sheet(tmp_path / "sheet.png", 11, 4) == images).all()
