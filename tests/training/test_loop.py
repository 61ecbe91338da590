# SPDX-License-Identifier: Apache-2.0
"""The loop: metrics, checkpoints, signals, resuming. The job is a small quadratic."""

import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gift_jax
from gift_jax.runtime import progress
from gift_jax.runtime.errors import NonFiniteError, StoppedBySignal, UserError
from gift_jax.state import init_state
from gift_jax.training import checkpoint, loop, sharding

KEY = jax.random.key(1)
TX = optax.adam(0.1)
ROOT = pathlib.Path(gift_jax.__file__).parents[1]


class Counter:
    """A data iterator: batches of its own position; calls `at[position]` if any."""

    def __init__(self, at=None):
        self.position = 0
        self._at = at or {}

    def __next__(self):
        self.position += 1
        if self.position in self._at:
            self._at[self.position]()
        return {"x": np.full((4, 3), self.position, np.float32)}

    def get_state(self):
        return {"position": self.position}

    def set_state(self, state):
        self.position = state["position"]


def quadratic(state, frozen, batch, key):
    """Follows the data, with noise drawn from the key and the step."""
    key = jax.random.fold_in(key, state.step)

    def loss_fn(params):
        noise = 0.1 * jax.random.normal(key, params["w"].shape)
        target = jnp.mean(batch["train"]["x"], axis=0) + noise
        return jnp.mean(jnp.square(params["w"] - target - frozen["shift"]))

    loss, grads = jax.value_and_grad(loss_fn)(state.params)
    updates, opt = TX.update(grads, state.opt["train"], state.params)
    params = optax.apply_updates(state.params, updates)
    new = state.replace(step=state.step + 1, params=params, opt={"train": opt})
    return new, {"train/loss": loss}


def test_a_step_is_compiled_once_whatever_types_the_parameters_have():
    """Weak types, of `jnp.full(3, 1.0)`, would be lost by the first steps."""
    params = {"w": jnp.full(3, 1.0)}
    opt = {"train": TX.init(params)}
    state = init_state(params, opt)
    assert params["w"].weak_type
    assert any(a.weak_type for a in jax.tree.leaves(opt))
    assert not any(a.weak_type for a in jax.tree.leaves(state))


def broken_after(steps):
    """The same step, with a NaN loss at one step and in all parameters after it."""

    def step(state, frozen, batch, key):
        done = state.step + 1
        new, metrics = quadratic(state, frozen, batch, key)
        bad = jnp.where(done >= steps, jnp.nan, 0.0)
        params = jax.tree.map(lambda a: a + bad, new.params)
        return new.replace(params=params), {"train/loss": metrics["train/loss"] + bad}

    return step


def run(
    workdir,
    steps,
    *,
    at=None,
    step=quadratic,
    devices=1,
    key=KEY,
    callbacks=(),
    **options,
):
    mesh = sharding.make_mesh(jax.devices()[:devices])
    params = {"w": jnp.zeros((3,))}
    state = init_state(params, {"train": TX.init(params)})
    workdir.mkdir(exist_ok=True)
    return loop.run(
        sharding.replicate(mesh, state),
        step,
        sharding.replicate(mesh, {"shift": jnp.ones(3)}),
        loop.Batches({"train": Counter(at)}),
        sharding.replicate(mesh, key),
        options=loop.Options(
            steps, **({"log_every": 1, "checkpoint_every": 2} | options)
        ),
        workdir=workdir,
        place=lambda batch: sharding.put_batch(mesh, batch),
        callbacks=callbacks,
    )


def command(definitions, at):
    """Returns the command of a process that runs 40 steps in the folder job.

    Args: definitions: functions, as text. at: {step: one of them}, as text.
    """
    script = f"""
import pathlib, resource, signal, sys, time
sys.path.insert(0, {str(pathlib.Path(__file__).parent)!r})
import test_loop
from gift_jax.runtime import cli
{textwrap.dedent(definitions)}
cli.run_main(lambda: test_loop.run(pathlib.Path("job"), 40, at={at}) and 0)
"""
    return [sys.executable, "-c", script]


def lines(workdir):
    return [json.loads(s) for s in (workdir / "metrics.jsonl").read_text().splitlines()]


def without_time(workdir):
    return [
        {k: v for k, v in line.items() if not k.startswith("time/")}
        for line in lines(workdir)
    ]


def latest_checkpoint(workdir):
    with contextlib.closing(checkpoint.Checkpoints(workdir / "checkpoints")) as store:
        return store.latest_step()


def assert_same_state(a, b):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(a), jax.device_get(b))


# --- steps ----------------------------------------------------------------------------


def slow(state, frozen, batch, key):
    """The same step, after work that takes longer than handing over the next."""
    work = jax.lax.fori_loop(0, 60, lambda _, a: jnp.tanh(a @ a), jnp.ones((300, 300)))
    new, metrics = quadratic(state, frozen, batch, key)
    return new.replace(step=new.step + (work[0, 0] > 2).astype(jnp.int32)), metrics


@pytest.mark.parametrize("count", [1, 2])
def test_devices_that_share_threads_take_one_step_after_the_other(tmp_path, count):
    """Two steps at once can wait for each other's threads forever."""
    were_done, compiled = [], []

    def step(*args):
        if not compiled:
            compiled.append(loop.compile_step(slow, args))
        were_done.append(args[0].step.is_ready())
        return compiled[0](*args)

    step.lower = None  # it is compiled already, for `loop.run`
    run(tmp_path, 8, step=step, devices=count, log_every=8, checkpoint_every=0)
    assert len(were_done) == 8
    assert all(were_done[2:]) == (count == 2)  # one device: handed over before


def test_time_left_of_parts_counts_their_known_times_and_this_machines_pace(
    monkeypatch,
):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    table = progress.Timetable([10.0, 100.0, 30.0, 60.0])
    assert table.left() == "about 3:20"
    assert table.next() == "part 1 of 4, about 3:20 left"
    now[0] = 20.0  # half as fast as where the times are from
    assert table.next() == "part 2 of 4, about 6:20 left"
    now[0] = 20.1  # it was done already, and says nothing of the machine
    assert table.next() == "part 3 of 4, about 3:00 left"


# --- callbacks ------------------------------------------------------------------------


def test_callbacks_get_the_state_of_their_steps_once_a_run(tmp_path):
    calls = []

    def call(step, state):
        calls.append((step, int(state.step), jax.device_get(state.params["w"])))

    callbacks = [loop.Callback((0, 3, 4, 9), call)]
    first = run(tmp_path / "a", 4, callbacks=callbacks)
    assert [(step, state_step) for step, state_step, _ in calls] == [
        (0, 0), (3, 3), (4, 4)
    ]  # fmt: skip
    np.testing.assert_array_equal(calls[2][2], first.params["w"])
    assert not np.array_equal(calls[1][2], calls[2][2])
    run(tmp_path / "a", 6, callbacks=callbacks)  # resumed at 4: no step is repeated
    assert len(calls) == 3
    assert_same_state(run(tmp_path / "b", 6), run(tmp_path / "a", 6))
    assert without_time(tmp_path / "a") == without_time(tmp_path / "b")


def test_callbacks_do_not_count_as_the_steps_time(tmp_path, monkeypatch):
    now = [0.0]

    def clock():
        now[0] += 1.0
        return now[0]

    monkeypatch.setattr(loop.time, "perf_counter", clock)

    def slow(step, state):
        now[0] += 1000.0

    run(tmp_path, 3, callbacks=[loop.Callback((0, 2), slow)])
    assert now[0] > 2000
    assert max(line["time/step_s"] for line in lines(tmp_path)) < 10


def test_callback_does_not_see_a_nan(tmp_path):
    callbacks = [loop.Callback((3,), lambda step, state: pytest.fail("called"))]
    with pytest.raises(NonFiniteError, match="step 3"):
        run(tmp_path, 9, step=broken_after(3), callbacks=callbacks, log_every=100)


# --- metrics and progress -------------------------------------------------------------


def test_metrics_are_one_json_object_a_logged_step(tmp_path):
    run(tmp_path, 7, log_every=3, checkpoint_every=0)
    logged = lines(tmp_path)
    assert [line["step"] for line in logged] == [3, 6, 7]
    names = {"step", "train/loss", "time/step_s", "time/examples_per_s"}
    for line in logged:
        assert set(line) == names
        assert line["time/step_s"] > 0
        assert np.isfinite(line["train/loss"])
    rates = [line["time/step_s"] * line["time/examples_per_s"] for line in logged]
    np.testing.assert_allclose(rates, 4, rtol=0.1)


def test_a_resumed_run_keeps_its_key(tmp_path):
    straight = run(tmp_path / "straight", 4)
    other = run(tmp_path / "other", 4, key=jax.random.key(2))
    assert (straight.params["w"] != other.params["w"]).any()
    run(tmp_path / "resumed", 2)
    resumed = run(tmp_path / "resumed", 4, key=jax.random.key(2), devices=2)
    np.testing.assert_allclose(straight.params["w"], resumed.params["w"], rtol=1e-6)


def test_metrics_go_to_tensorboard_too(tmp_path):
    run(tmp_path, 2)
    assert list(tmp_path.glob("events.out.tfevents.*"))


def test_progress_lines_show_losses_and_the_time_left(monkeypatch):
    clock = [100.0]
    messages = []
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(
        progress.logging, "info", lambda text, *args: messages.append(text % args)
    )
    with progress.bar("work", 100, start=50) as bar:
        clock[0] += 20.0  # the first step compiles: no estimate yet
        bar.update(51)
        clock[0] += 18.0
        values = {"upper/loss": 0.5, "upper/safe_detected": 0.25, "other": 1.0}
        bar.update(60, values)
    assert messages == [
        "work 51/100 ",
        "work 60/100 upper/loss 0.5 upper/safe_detected 0.25 2 s each, 1:20 left",
    ]


# --- NaN ------------------------------------------------------------------------------


def test_nan_stops_the_run_and_is_never_saved(tmp_path):
    with pytest.raises(NonFiniteError) as stopped:
        run(tmp_path, 10, step=broken_after(4), checkpoint_every=2)
    assert stopped.value.exit_code == 3
    assert str(stopped.value) == (
        "step 4: train/loss is nan; so is the parameter w (last checkpoint: 2). Lower "
        "the learning rate, or bound the ascent, and use another --workdir."
    )
    assert latest_checkpoint(tmp_path) == 2
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3]


def test_concept_that_a_step_had_no_pair_of_has_no_entry(tmp_path):
    def step(state, frozen, batch, key):
        state, metrics = quadratic(state, frozen, batch, key)
        seen = jnp.where(state.step == 2, jnp.nan, 1.0)
        return state, metrics | {"concept/a": seen, "concept/b": 3.0}

    run(tmp_path, 3, step=step)
    entries = [set(line) & {"concept/a", "concept/b"} for line in lines(tmp_path)]
    assert entries == [
        {"concept/a", "concept/b"},
        {"concept/b"},
        {"concept/a", "concept/b"},
    ]


def test_nan_between_logged_steps_is_found_before_it_is_saved(tmp_path):
    with pytest.raises(NonFiniteError, match=r"step 4: train/loss is nan"):
        run(tmp_path, 10, step=broken_after(4), log_every=100, checkpoint_every=3)
    assert latest_checkpoint(tmp_path) == 3


def test_loss_that_was_not_finite_for_a_moment_is_named(tmp_path):
    def step(state, frozen, batch, key):
        state, metrics = quadratic(state, frozen, batch, key)
        bad = jnp.where(state.step == 4, jnp.inf, 0.0)
        return state, {"train/grad_norm": metrics["train/loss"] + bad, **metrics}

    with pytest.raises(NonFiniteError) as e:
        run(tmp_path, 10, step=step, log_every=100, checkpoint_every=3)
    message = "step 4: train/grad_norm is not finite (last checkpoint: 3)"
    assert str(e.value).startswith(message)


def test_parameter_that_is_not_finite_is_named_and_never_saved(tmp_path):
    def step(state, frozen, batch, key):
        state, metrics = quadratic(state, frozen, batch, key)
        w = state.params["w"].at[1].add(jnp.where(state.step == 6, jnp.inf, 0.0))
        return state.replace(params={"w": w}), metrics

    with pytest.raises(NonFiniteError, match="step 6: parameter w is"):
        run(tmp_path, 6, step=step, checkpoint_every=3, devices=2)
    assert latest_checkpoint(tmp_path) == 3


def test_disk_that_takes_no_more_metrics_ends_the_run_in_one_line(tmp_path):
    full = """
    def full():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (300, resource.RLIM_INFINITY))
    """
    done = subprocess.run(
        command(full, "{2: full}"),
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ") and "cannot be written (File too large)" in last
    assert [line["step"] for line in lines(tmp_path / "job")]  # each of them whole


# --- resuming -------------------------------------------------------------------------


def test_resumed_run_equals_a_straight_one(tmp_path):
    straight = run(tmp_path / "a", 9)
    assert float(jnp.abs(straight.params["w"]).max()) > 0.1
    run(tmp_path / "b", 4)
    resumed = run(tmp_path / "b", 9)
    assert_same_state(straight, resumed)
    assert without_time(tmp_path / "a") == without_time(tmp_path / "b")


def test_run_killed_between_checkpoints_repeats_the_lost_steps(tmp_path):
    def die():
        raise RuntimeError("power cut")

    straight = run(tmp_path / "a", 9, checkpoint_every=4)
    with pytest.raises(RuntimeError, match="power cut"):
        run(tmp_path / "b", 9, checkpoint_every=4, at={8: die})
    assert latest_checkpoint(tmp_path / "b") == 4
    assert [line["step"] for line in lines(tmp_path / "b")] == [1, 2, 3, 4, 5, 6, 7]
    resumed = run(tmp_path / "b", 9, checkpoint_every=4)
    assert_same_state(straight, resumed)
    assert without_time(tmp_path / "a") == without_time(tmp_path / "b")


def test_line_cut_short_by_a_crash_is_dropped(tmp_path):
    run(tmp_path / "a", 6)
    run(tmp_path / "b", 4)
    with open(tmp_path / "b" / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "train/lo')
    run(tmp_path / "b", 6)
    assert without_time(tmp_path / "a") == without_time(tmp_path / "b")


def test_finished_run_takes_no_step_again(tmp_path):
    done = run(tmp_path, 4)
    text = (tmp_path / "metrics.jsonl").read_text()

    def refuse(*_):
        raise AssertionError("a step was taken")

    again = run(tmp_path, 4, step=refuse)
    assert_same_state(done, again)
    assert (tmp_path / "metrics.jsonl").read_text() == text


def test_zero_steps_return_the_start(tmp_path):
    state = run(tmp_path, 0)
    assert int(state.step) == 0
    np.testing.assert_array_equal(state.params["w"], 0)
    assert lines(tmp_path) == []


def test_checkpoint_that_does_not_fit_is_a_user_error(tmp_path):
    run(tmp_path, 2)
    params = {"w": jnp.zeros((5,))}
    state = init_state(params, {"train": TX.init(params)})
    with pytest.raises(UserError, match="does not fit this config"):
        loop.run(
            state,
            quadratic,
            {"shift": jnp.ones(5)},
            loop.Batches({"train": Counter()}),
            KEY,
            options=loop.Options(4),
            workdir=tmp_path,
        )


# --- signals --------------------------------------------------------------------------


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_signal_saves_then_stops_and_the_rerun_equals_a_straight_run(tmp_path, signum):
    options = {"checkpoint_every": 100, "log_every": 2}
    straight = run(tmp_path / "a", 8, **options)
    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    kill = {5: lambda: os.kill(os.getpid(), signum)}
    with pytest.raises(StoppedBySignal) as stopped:
        run(tmp_path / "b", 8, at=kill, **options)
    assert stopped.value.exit_code == 128 + signum
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert latest_checkpoint(tmp_path / "b") == 5
    resumed = run(tmp_path / "b", 8, **options)
    assert_same_state(straight, resumed)
    assert without_time(tmp_path / "a") == without_time(tmp_path / "b")


def test_signal_in_the_last_step_stops_the_job_too(tmp_path):
    kill = {3: lambda: os.kill(os.getpid(), signal.SIGTERM)}
    with pytest.raises(StoppedBySignal):
        run(tmp_path, 3, at=kill)
    assert latest_checkpoint(tmp_path) == 3


def test_nan_at_the_moment_of_a_signal_is_not_saved(tmp_path):
    kill = {4: lambda: os.kill(os.getpid(), signal.SIGTERM)}
    with pytest.raises(NonFiniteError, match="step 4"):
        run(tmp_path, 9, step=broken_after(4), at=kill, log_every=100)
    assert latest_checkpoint(tmp_path) == 2


def test_process_ends_with_the_signals_exit_code(tmp_path):
    wait = """
    def wait():
        print("ready", flush=True)
        time.sleep(2)  # goes on after the handler
    """
    process = subprocess.Popen(
        command(wait, "{4: wait}"),
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate()
    assert process.returncode == 143, error
    assert "Traceback" not in error
    assert "stopped by signal 15 after a checkpoint" in error
    assert latest_checkpoint(tmp_path / "job") == 4


# --- compilation and devices ----------------------------------------------------------


@pytest.mark.parametrize("start", [0, 4])
def test_steps_after_the_first_compile_nothing(tmp_path, start):
    compilations, seen = [], {}
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: (
            compilations.append(event)
            if event == "/jax/core/compile/backend_compile_duration"
            else None
        )
    )
    if start:
        run(tmp_path, start, devices=2)
    at = {start + i: lambda i=i: seen.update({i: len(compilations)}) for i in (1, 2, 5)}
    run(tmp_path, start + 5, devices=2, at=at, step=lambda *args: quadratic(*args))
    assert seen[2] > seen[1]
    assert seen[5] == seen[2]


def test_state_is_donated_and_frozen_is_not(tmp_path):
    step = loop.compile_step(quadratic)
    params = {"w": jnp.zeros((3,))}
    state = init_state(params, {"train": TX.init(params)})
    frozen = {"shift": jnp.ones(3)}
    batch = {"train": {"x": jnp.ones((4, 3))}}
    new, _ = step(state, frozen, batch, KEY)
    assert state.opt["train"][0].mu["w"].is_deleted()
    assert not frozen["shift"].is_deleted() and not new.params["w"].is_deleted()


def test_result_does_not_depend_on_the_number_of_devices(tmp_path):
    single = run(tmp_path / "a", 5)
    double = run(tmp_path / "b", 5, devices=2)
    assert len(double.params["w"].sharding.device_set) == 2
    np.testing.assert_allclose(double.params["w"], single.params["w"], atol=1e-5)


def test_batches_advance_and_resume_together():
    batches = loop.Batches({"safe": Counter(), "harmful": Counter()})
    next(batches)
    state = json.loads(json.dumps(batches.get_state()))
    expected = next(batches)
    again = loop.Batches({"safe": Counter(), "harmful": Counter()})
    again.set_state(state)
    jax.tree.map(np.testing.assert_array_equal, next(again), expected)
    assert set(expected) == {"safe", "harmful"}
