# SPDX-License-Identifier: Apache-2.0
"""The benchmark on a tiny model: its cells, its resuming, its mistakes."""

import json
import os
import pathlib
import signal
import subprocess
import sys

import jax
import pytest

import gift_jax
from gift_jax import attack
from gift_jax.benchmark import __main__ as benchmark_main
from gift_jax.benchmark import (
    cells,
    evaluation,
    matrix,
    store,
    summary,
    workers,
    workload,
)
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


MODEL: list[str] = []  # the flag that names the tiny one


@pytest.fixture(autouse=True, scope="module")
def tiny_model(tiny_folder):
    MODEL[:] = [f"--config.model={tiny_folder}"]


def argv_of(workdir, *flags):
    return [f"--config={CONFIG}:smoke", f"--workdir={workdir}", *MODEL, *flags]


def main(workdir, *flags):
    assert benchmark_main.main(argv_of(workdir, *flags)) == 0
    return json.loads((workdir / "results.json").read_text())


def lines_of(folder):
    """The lines of cells, by id, and the others."""
    lines = (folder / store.FILE).read_text().splitlines()
    entries = [json.loads(line) for line in lines]
    done = [entry for entry in entries if "id" in entry]
    by_id = {entry["id"]: entry for entry in done}
    assert len(by_id) == len(done)  # no cell was done twice
    return by_id, [entry for entry in entries if "id" not in entry]


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
    with open(folder / store.FILE, "a") as file:
        file.write('{"id":"gear/uce/harm')  # as a killed process leaves it


def test_each_cell_runs_once_and_is_evaluated_along_the_way(smoke, folder):
    data, ran, compiled = smoke
    cfg = load_config(f"{CONFIG}:smoke")
    expected = matrix.Matrix(cfg).cells
    assert len(expected) == len(data["cells"]) == 10
    assert ran == expected[3:]
    assert len(compiled) > 1 and len(set(map(id, compiled))) == 1  # one program
    for cell, result in zip(expected, data["cells"], strict=True):
        assert result["method"] == cell.method and result["side"] == cell.side
        steps = [1, 2] if cell.is_attacked else [0]
        assert [point["step"] for point in result["points"]] == steps
        assert ("step_s" in result) == cell.is_attacked
        for point in result["points"]:
            sheet = folder / point["sheet"]
            marks = json.loads(sheet.with_suffix(".json").read_text())
            assert len(marks["labels"]) == 2
            assert len(marks["judge_image_similarity"]) == 2
            assert point["values"]["classifier_accuracy"] in (0.0, 0.5, 1.0)
            assert grid.read_sheet(sheet, 2).shape == (2, 16, 16, 3)
            is_twin = cell.side == summary.RETAINED and cell.is_defended
            assert ("twin_rms" in point["values"]) == is_twin
    assert data["skipped"] == {}  # the fidelity of retained things is measured
    sheets = [
        grid.read_sheet(folder / result["points"][-1]["sheet"], 2)
        for result in data["cells"]
        if result["side"] == summary.HARMFUL
    ]
    assert all((sheets[0] != other).any() for other in sheets[1:])  # models differ
    assert not list(folder.rglob("checkpoints")) + list(folder.rglob("points"))
    for side in summary.SIDES:
        assert (folder / f"gear_{side}.png").exists()


def test_results_name_their_origin_and_hold_gap_ratios(smoke, folder):
    data, _, _ = smoke
    assert "| side, attack | original | uce |" in (folder / "results.md").read_text()
    assert data["command"].startswith("python -m gift_jax.benchmark --config=")
    provenance = data["metrics"]["judge_image_similarity"]["provenance"]
    assert {"backbone", "version", "resolution"} <= set(provenance)
    assert data["config"]["samples"]["seed"] == 2
    assert set(data["config"]["definitions"]["concepts"]) == {"gear"}
    assert data["versions"]["jax"] == jax.__version__
    assert data["versions"]["device"] == "cpu"
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
    names = [row["method"] for row in data["headline"]]
    assert names == [summary.IGNORANCE, "original", "uce"]
    assert data["headline"][2]["fidelity"]["twin_rms"] > 0


def test_a_cell_has_one_line_of_at_most_two_kilobytes(smoke, folder):
    by_id, others = lines_of(folder)
    assert len(by_id) == 10 and 1 <= len(others) <= 3
    sizes = [len(line) for line in (folder / store.FILE).read_text().splitlines()]
    small = [n for n in sizes if n <= store.LINE_BYTES]
    assert len(small) >= 10
    for entry in by_id.values():
        assert len(json.dumps(entry)) <= store.LINE_BYTES


def test_largest_line_of_a_suite_fits_two_kilobytes():
    jobs = matrix.Matrix(load_config(f"{CONFIG}:standard"))
    one = next(c for c in jobs.cells if c.prompt == "existing_word" and c.is_defended)
    names = ("classifier_accuracy", "judge_image_similarity", "judge_nearest_train")
    names += ("clip_score judge", "judge_lpips", "judge_lpips_nearest_train")
    point = {"step": 150, "num": 24, "values": dict.fromkeys(names, -0.1234)}
    entry = {"id": one.id, "points": [point] * 3, "digests": jobs.digests(one)}
    entry |= {"seconds": 1234.5, "step_s": 0.1234, "defense_seconds": 1234.5}
    assert len(json.dumps(entry)) < 0.75 * store.LINE_BYTES


def test_finished_benchmark_is_published(smoke, folder, tmp_path):
    paths = publish.publish(load_all([str(folder)])[0], tmp_path)
    names = [path.name for path in paths]
    assert names == [
        *("config.json", "grid.webp", "summary.json", "table.md"),
        *("tradeoff.png", "trajectories.png"),
    ]
    again = load_all([str(tmp_path)])[0].data
    assert again["summary"] == smoke[0]["summary"]
    assert again["headline"] == smoke[0]["headline"]


def test_same_command_runs_nothing_again_and_other_settings_are_refused(smoke, folder):
    data, _, _ = smoke
    assert main(folder) == data
    for flag, part in (
        ("samples.seed=3", "samples"),
        ("shared_overrides.attack.steps=3", "eval_steps, attack"),
        ("metrics.names=sharpness", "metrics"),
    ):
        with pytest.raises(UserError, match=f"done with other settings of {part}"):
            main(folder, f"--config.{flag}")


@pytest.mark.slow
def test_compact_results_alone_go_on_elsewhere_with_two_workers(
    smoke, folder, tmp_path, pytestconfig
):
    data, _, _ = smoke
    elsewhere, removed = tmp_path / "elsewhere", []
    elsewhere.mkdir()
    with open(elsewhere / store.FILE, "w") as file:
        for line in (folder / store.FILE).read_text().splitlines(keepends=True):
            id = json.loads(line).get("id", "")
            if "/lora/" in id and "harmful" in id:
                removed.append(id)
            else:
                file.write(line)
    assert len(removed) == 2  # of the original and of uce, which is made again
    before, _ = lines_of(elsewhere)
    command = [sys.executable, "-m", "gift_jax.benchmark", *argv_of(elsewhere)]
    done = subprocess.run(
        [*command, "--workers=2"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    after, _ = lines_of(elsewhere)
    assert after.keys() == before.keys() | set(removed)
    assert all(after[id] == entry for id, entry in before.items())
    assert (elsewhere / "defenses").exists() and workers.log_path(elsewhere, 1).exists()
    again = json.loads((elsewhere / "results.json").read_text())
    values = [
        [point["values"] for cell in d["cells"] for point in cell["points"]]
        for d in (data, again)
    ]
    for one, two in zip(*values, strict=True):  # the same steps, on one core or two
        assert one == pytest.approx(two, abs=0.02)


HOLD = """
import pathlib, sys, time
from gift_jax.benchmark.store import Store
with Store(pathlib.Path(sys.argv[1])).claim("cell") as mine:
    print(mine, flush=True)
    time.sleep(60 if mine else 0)
"""


def test_cell_is_claimed_once_and_free_when_its_process_is_killed(tmp_path):
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout.readline().strip() == "True"
        with store.Store(tmp_path).claim("cell") as mine:
            assert not mine
        with store.Store(tmp_path).claim("another") as mine:
            assert mine
        os.kill(first.pid, signal.SIGKILL)
        first.wait()
    with store.Store(tmp_path).claim("cell") as mine:
        assert mine


def test_two_processes_write_whole_lines(tmp_path):
    code = """
import pathlib, sys
from gift_jax.benchmark.store import Store
results = Store(pathlib.Path(sys.argv[1]))
for i in range(100):
    results._append({"id": f"{sys.argv[2]}/{i}", "text": "x" * 1500})
"""
    command = [sys.executable, "-c", code, str(tmp_path)]
    writers = [subprocess.Popen([*command, name]) for name in "ab"]
    assert [writer.wait() for writer in writers] == [0, 0]
    by_id, _ = lines_of(tmp_path)
    assert len(by_id) == 200


def test_line_that_is_no_result_is_named(tmp_path):
    (tmp_path / store.FILE).write_text('{"id": "a"}\n[]\n')
    with pytest.raises(UserError, match="cells.jsonl, line 2: is no result"):
        store.Store(tmp_path).read()


class Child:
    """A worker that has ended."""

    def __init__(self, code):
        self.returncode = code

    def poll(self):
        return self.returncode


def test_worker_that_ends_early_is_reported_with_its_reason(tmp_path, monkeypatch):
    jobs = matrix.Matrix(load_config(f"{CONFIG}:smoke"))
    log = workers.log_path(tmp_path, 1)
    log.write_text("model emoji-sd\nerror: the disk is full\n")
    for code, error, message in (
        (2, UserError, "the disk is full"),
        (-9, workers.WorkerError, "10 of 10 cells are left; worker 1 ended with code"),
    ):
        start = iter([Child(0), Child(code)]).__next__
        monkeypatch.setattr(workers, "_start", lambda *a, start=start: start())
        with pytest.raises(error, match=message):
            workers.run(jobs, tmp_path, [], 2)


@pytest.mark.parametrize("count", [0, 999])
def test_more_workers_than_cores_are_refused(tmp_path, count):
    with pytest.raises(UserError, match=f"--workers={count} must be between 1 and"):
        benchmark_main.main(argv_of(tmp_path / "x", f"--workers={count}"))
    assert not (tmp_path / "x").exists()


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs Linux")
def test_workers_divide_the_cores():
    code = """
import os
from gift_jax.benchmark import workers
os.sched_getaffinity = lambda pid: {0, 1, 2, 5, 7}
taken = []
os.sched_setaffinity = lambda pid, cores: taken.append(cores)
workers.take_cores(0, 2), workers.take_cores(1, 2)
print(taken)
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[[0, 2, 7], [1, 5]]"


def test_dry_run_counts_and_estimates_without_a_folder(capsys):
    flags = ["--dry-run", "--step-seconds=36", "--image-seconds=0.5"]
    assert benchmark_main.main([f"--config={CONFIG}:smoke", *flags]) == 0
    lines = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    counts = {name: number for number, name in lines}
    # UCE takes no steps; lora on two models and two sides, 2 steps each, two points;
    # and six points before
    assert counts["cells"] == "10" and counts["defended models"] == "1"
    assert counts["defense steps"] == "0" and counts["attack steps"] == "8"
    assert counts["images"] == "28"
    assert lines[-1][0] == "0.1" and lines[-1][1].startswith("device hours, at 36 s")
    with pytest.raises(UserError, match="--step-seconds=0.0 must be above 0"):
        benchmark_main.main(
            [f"--config={CONFIG}:smoke", "--dry-run", "--step-seconds=0"]
        )
    with pytest.raises(UserError, match="--workdir is missing"):
        benchmark_main.main([f"--config={CONFIG}:smoke"])


def test_folder_that_is_no_model_is_refused_before_anything_is_trained(tmp_path):
    with pytest.raises(UserError, match=str(tmp_path)):
        main(tmp_path / "x", f"--config.model={tmp_path}")
    assert not list((tmp_path / "x").rglob("metrics.jsonl"))


def test_cells_of_the_longest_defense_come_first():
    jobs = matrix.Matrix(load_config(f"{CONFIG}:quick"))
    ordered = workload.longest_defense_first(jobs, jobs.cells)
    methods = list(dict.fromkeys(cell.method for cell in ordered))
    assert methods[0] == "gift_gate"  # 3,000 short steps
    assert set(methods[1:3]) == {"gift", "gift_adversarial"}  # 500 steps
    assert set(methods[-2:]) == {"original", "uce"}  # none
    assert methods != list(dict.fromkeys(cell.method for cell in jobs.cells))


def test_hours_are_those_of_steps_and_images():
    counts = {"attack steps": 100, "defense steps": 10, "images": 50}
    assert workload.device_hours(counts, 36, 72) == pytest.approx(1 + 0.3 + 1)
    assert workload.device_hours(counts, 36, 72, 36) == pytest.approx(1 + 0.1 + 1)


def test_shared_step_takes_the_rate_from_its_state(tmp_path):
    jobs = matrix.Matrix(load_config(str(CONFIG)))
    bench = cells.Bench(jobs, tmp_path, store.Store(tmp_path))

    class Plan:
        def __init__(self):
            self.step = lambda state, frozen, batch, key: (state, {})

    def step_of(name):
        cell = matrix.Cell("gear", "gift", "harmful", name, "name")
        return bench._shared_step(jobs.attack_config(cell))(Plan())

    assert step_of("lora") is step_of("lora_x3")
    assert step_of("dreambooth") is step_of("dreambooth_dropout")
    assert step_of("lora") is not step_of("dreambooth")
    assert loop.compile_step(step_of("lora")) is step_of("lora")


def test_sheet_comes_back_as_it_was(tmp_path, rng):
    images = rng.integers(0, 256, (11, 4, 6, 3), "uint8")
    grid.save_sheet(images, tmp_path / "sheet.png", 4)
    assert (grid.read_sheet(tmp_path / "sheet.png", 11, 4) == images).all()
