# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: what goes in comes out, and what does not fit is refused."""

import contextlib
import gc
import os
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gift_jax.runtime.errors import UserError
from gift_jax.state import init_state
from gift_jax.training import checkpoint, checksums

slow = pytest.mark.slow


def make_state(value=1.0, size=3):
    params = {"a/kernel": jnp.full((size, 2), value), "b": jnp.arange(4.0) + value}
    tx = optax.adam(1e-3)
    return init_state(params, {"lower": tx.init(params), "upper": tx.init(params)})


@pytest.fixture
def store(tmp_path):
    with contextlib.closing(checkpoint.Checkpoints(tmp_path / "c", keep=2)) as store:
        yield store


def test_restore_returns_what_was_saved(store, tmp_path):
    state = make_state(2.5).replace(step=jnp.int32(7))
    store.save(7, state, {"safe": {"next_index": 21}})
    store.close()
    with contextlib.closing(checkpoint.Checkpoints(tmp_path / "c")) as again:
        assert again.latest_step() == 7
        restored, data = again.restore(make_state(0.0))
    assert data == {"safe": {"next_index": 21}}
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    for ours, saved in zip(
        jax.tree.leaves(restored), jax.tree.leaves(state), strict=True
    ):
        assert ours.dtype == saved.dtype
        np.testing.assert_array_equal(ours, saved)


def test_a_new_folder_has_no_checkpoint(store):
    assert store.latest_step() is None


def test_only_the_newest_are_kept(store):
    for step in (1, 2, 3):
        store.save(step, make_state(float(step)), {})
    store.close()
    folders = {p.name for p in store.folder.iterdir()}
    assert folders == {"2", "3"}


def test_an_older_checkpoint_can_be_asked_for(store):
    for step in (1, 2):
        store.save(step, make_state(float(step)), {"at": step})
    state, data = store.restore(make_state(0.0), step=1)
    assert data == {"at": 1}
    np.testing.assert_array_equal(state.params["a/kernel"], 1.0)


def test_schedule(tmp_path):
    with contextlib.closing(checkpoint.Checkpoints(tmp_path, every=50)) as store:
        assert [s for s in range(1, 151) if store.due(s)] == [50, 100, 150]
    with contextlib.closing(checkpoint.Checkpoints(tmp_path, every=0)) as store:
        assert not any(store.due(s) for s in range(1, 151))


def test_saving_is_not_disturbed_by_donation(store):
    state = make_state(1.0, size=2**20)
    wreck = jax.jit(lambda s: jax.tree.map(lambda a: a * 0 - 1, s), donate_argnums=0)
    saved = jax.device_get(jax.tree.map(jnp.copy, state))
    store.save(1, state, {})
    wrecked = state
    for _ in range(3):
        wrecked = wreck(wrecked)
    assert float(wrecked.params["b"][0]) == -1
    restored, _ = store.restore(make_state(0.0, size=2**20))
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(restored), saved)


def test_a_save_does_not_ask_which_step_all_stop_at(store, monkeypatch):
    """JAX takes the step that it is asked with for the step that the run is at."""
    steps = []
    monkeypatch.setattr(multihost_utils, "reached_preemption_sync_point", steps.append)
    assert ocp.utils.reached_preemption(1) is None and steps == [1]  # as Orbax asks
    for step in (2, 4):
        store.save(step, make_state(), {})
    store.close()
    assert steps == [1]


def test_checkpoint_of_another_shape_is_refused(store):
    store.save(4, make_state(size=3), {})
    message = r"/4 does not fit.* is \[3, 2\], not \[5, 2\]; use another --workdir"
    with pytest.raises(UserError, match=message) as e:
        store.restore(make_state(size=5))
    assert "\n" not in str(e.value)


def test_checkpoint_of_other_parameters_is_refused(store):
    store.save(4, make_state(), {})
    other = make_state()
    other.params["c"] = other.params.pop("b")
    message = "missing params/c; unexpected params/b; use another --workdir"
    with pytest.raises(UserError, match=message) as e:
        store.restore(other)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("specs", [("data", None), (None, "data")])
def test_restore_onto_another_sharding_than_it_was_saved_with(store, specs):
    mesh = Mesh(np.asarray(jax.devices()), ("data",))
    saved, other = (NamedSharding(mesh, PartitionSpec(spec)) for spec in specs)
    assert len(mesh.devices) == 2
    state = {"w": jax.device_put(jnp.arange(8.0), saved)}
    store.save(1, state, {})
    fresh = {"w": jax.device_put(jnp.zeros(8), other)}
    restored, _ = store.restore(fresh)
    assert restored["w"].sharding == other != saved
    np.testing.assert_array_equal(restored["w"], np.arange(8.0))


KILLED = """
import os, sys
import jax.numpy as jnp
from gift_jax.training.checkpoint import Checkpoints

store = Checkpoints(sys.argv[1], keep=5)
store.save(1, {"w": jnp.full(2**23, 1.0)}, {"at": 1})
store._manager.wait_until_finished()
store.save(2, {"w": jnp.full(2**23, 2.0)}, {"at": 2})
os._exit(9)  # as a kill would, with the second one on its way
"""


def test_a_save_that_is_killed_does_not_shadow_the_last_good_one(tmp_path):
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    assert subprocess.run(command, capture_output=True).returncode == 9
    (tmp_path / "3.orbax-checkpoint-tmp-7").mkdir()  # what a kill can leave, too
    store = checkpoint.Checkpoints(tmp_path)
    step = store.latest_step()
    assert step in (1, 2)
    state, position = store.restore({"w": jnp.zeros(2**23)})
    store.save(4, state, {"at": 4})
    store.close()
    assert position == {"at": step} and np.all(state["w"] == step)
    assert checkpoint.Checkpoints(tmp_path).latest_step() == 4


def test_trained_parameters_are_read_without_a_target(store):
    store.save(3, make_state(2.0), {})
    store.save(5, make_state(4.0), {})
    store.close()
    for step, expected_step in ((None, 5), (3, 3)):
        read_step, params = checkpoint.read_params(store.folder, step)
        assert read_step == expected_step
        assert jax.tree.all(jax.tree.map(lambda a: isinstance(a, np.ndarray), params))
        expected = make_state(2.0 if expected_step == 3 else 4.0).params
        jax.tree.map(np.testing.assert_array_equal, params, expected)
    with pytest.raises(UserError, match="has no step 4; steps there: 3, 5"):
        checkpoint.read_params(store.folder, 4)


# --- damaged and full disks -----------------------------------------------------------


def truncate(file):
    os.truncate(file, file.stat().st_size // 2)


def flip(file):
    """Flips one bit in the middle of a file."""
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 16
    file.write_bytes(bytes(data))


def saved(folder):
    """Checkpoints of steps 1 and 2, with values that do not compress to nothing."""
    store = checkpoint.Checkpoints(folder, keep=5)
    states = {}
    for step in (1, 2):
        w = jax.random.normal(jax.random.key(step), (64, 64))
        states[step] = {"params": {"w": w, "b": jnp.arange(7.0) * step}}
        store.save(step, states[step], {"at": step})
    store.close()
    return states


def files_of(step):
    return sorted(p for p in step.rglob("*") if p.is_file() and p.stat().st_size)


@pytest.fixture
def left_coroutines(monkeypatch):
    """Silences the coroutines that Orbax leaves behind when files are damaged."""
    gc.collect()
    monkeypatch.setattr(sys, "unraisablehook", lambda _: None)
    yield
    gc.collect()


@pytest.mark.usefixtures("left_coroutines")
@pytest.mark.parametrize(
    "damage",
    [flip, *(pytest.param(other, marks=slow) for other in (truncate, os.unlink))],
)
def test_a_damaged_checkpoint_is_never_taken_for_a_good_one(tmp_path, damage, caplog):
    fallen_back = 0
    states = saved(tmp_path / "whole")
    files = [p.relative_to(tmp_path / "whole") for p in files_of(tmp_path / "whole/2")]
    assert len(files) > 5
    for number, file in enumerate(files):
        folder = tmp_path / str(number)
        shutil.copytree(tmp_path / "whole", folder)
        damage(folder / file)
        fresh = jax.tree.map(jnp.zeros_like, states[1])
        with contextlib.closing(checkpoint.Checkpoints(folder)) as store:
            caplog.clear()
            state, data = store.restore(fresh)
            step = data["at"]
            jax.tree.map(np.testing.assert_array_equal, state, states[step])
            assert step in (1, 2)
            if step == 2:
                continue  # nothing that is read was damaged
            fallen_back += 1
            assert "2 cannot be read" in caplog.text
            assert "going on from step 1" in caplog.text
            assert (folder / "bad-2").is_dir() and store.latest_step() == 1
            store.save(2, states[2], {"at": "again"})
        with contextlib.closing(checkpoint.Checkpoints(folder)) as store:
            assert store.restore(fresh)[1] == {"at": "again"}
    assert fallen_back >= 3


@pytest.mark.usefixtures("left_coroutines")
def test_without_a_good_checkpoint_one_line_says_so(tmp_path):
    states = saved(tmp_path / "c")
    for file in (tmp_path / "c").rglob("*"):
        if file.is_file() and "d" in file.parent.name:
            truncate(file)
    with contextlib.closing(checkpoint.Checkpoints(tmp_path / "c")) as store:
        with pytest.raises(UserError, match="no checkpoint there can be read") as e:
            store.restore(jax.tree.map(jnp.zeros_like, states[1]))
    assert "\n" not in str(e.value) and "delete the folder" in str(e.value)
    with pytest.raises(UserError, match=r"2 cannot be read .*; try --step=1") as e:
        checkpoint.read_params(tmp_path / "c")
    assert "\n" not in str(e.value)


def test_checksums_do_not_depend_on_the_sharding():
    mesh = Mesh(np.asarray(jax.devices()), ("data",))
    a = jax.random.normal(jax.random.key(0), (8, 4))
    sums = {
        str(spec): checksums.of_tree(
            {"a": jax.device_put(a, NamedSharding(mesh, spec)), "b": np.uint8(3)}
        )
        for spec in (
            PartitionSpec(),
            PartitionSpec("data"),
            PartitionSpec(None, "data"),
        )
    }
    whole = sums.pop(str(PartitionSpec()))
    assert len(sums) == 2 and all(divided == whole for divided in sums.values())
    assert whole != checksums.of_tree({"a": a.at[3, 1].add(1e-6), "b": np.uint8(3)})


FULL = """
import pathlib, resource, signal, sys
import jax, jax.numpy as jnp
from gift_jax.runtime import cli
from gift_jax.training import checkpoint, checksums

def main():
    store = checkpoint.Checkpoints(sys.argv[1], keep=5)
    store.save(1, {"w": jax.random.normal(jax.random.key(1), (64, 64))}, {"at": 1})
    store._manager.wait_until_finished()
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**15, resource.RLIM_INFINITY))
    store.save(2, {"w": jax.random.normal(jax.random.key(2), (512, 512))}, {"at": 2})
    store.close()

cli.run_main(main)
"""


def test_disk_that_takes_no_more_is_one_line_and_keeps_the_last_good_one(tmp_path):
    command = [sys.executable, "-c", FULL, str(tmp_path / "c")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert "cannot be written (File too large)" in last and last.startswith("error: ")
    with contextlib.closing(checkpoint.Checkpoints(tmp_path / "c")) as store:
        _, data = store.restore({"w": jnp.zeros((64, 64))})
    assert data == {"at": 1}
