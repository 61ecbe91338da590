# SPDX-License-Identifier: Apache-2.0
"""Orbax checkpoints: trainable state and data position together, resumed together.

A checkpoint holds what changes (trainable parameters, optimiser states, step, key)
and the data iterators' position, with checksums of both. The frozen base model is only
referred to, by path and content hash, in the run's config.json.
"""

import contextlib
import json
import os
import pathlib
import shutil
import zlib
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging

from gift_jax.runtime import files, processes
from gift_jax.runtime.errors import DiskError, UserError


class _Manager(ocp.CheckpointManager):
    def reached_preemption(self, step: int) -> bool:
        """False: the loop asks at each step, through `hosts.asked_to_stop`.

        Orbax asks again when a save in the background ends, with that save's step.
        Where SIGTERM came then, the processes agreed on a step that this one had passed
        already, and waited for one another for ever.
        """
        return False


class Checkpoints:
    """The checkpoints of one run, newest last; saving is asynchronous and atomic.

    Args: folder: created if missing. keep: how many to keep. every: save at steps
      that are multiples of it; `save(..., force=True)` saves at any step.
    """

    def __init__(self, folder: pathlib.Path | str, *, keep: int = 2, every: int = 100):
        self.folder = pathlib.Path(folder).absolute()
        self.every = every
        with _disk_errors(self.folder):
            self._manager = _Manager(
                self.folder,
                options=ocp.CheckpointManagerOptions(max_to_keep=keep, create=True),
                item_handlers={
                    "state": ocp.StandardCheckpointHandler(),
                    "data": ocp.JsonCheckpointHandler(),
                },
            )

    def latest_step(self) -> int | None:
        """The newest complete checkpoint's step, or None."""
        return self._manager.latest_step()

    def due(self, step: int) -> bool:
        """Whether the run's schedule asks for a checkpoint after `step`."""
        return self.every > 0 and step % self.every == 0

    def save(self, step: int, state: Any, data_state: dict[str, Any]) -> None:
        """Saves state (a pytree of arrays) and the data position as step `step`.

        Raises: DiskError if the disk is full or cannot be written, perhaps only when
          the next one is saved or the store is closed.
        """
        if step == self._manager.latest_step():
            return
        data = {"position": data_state, "checksum": _checksum_of_json(data_state)}
        data["checksums"] = checksums(state)
        with _disk_errors(self.folder):
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state), data=ocp.args.JsonSave(data)
                ),
                force=True,
            )

    def restore(self, state: Any, step: int | None = None) -> tuple[Any, dict]:
        """Returns (state, data position) of `step`, by default of the newest good one.

        Newer ones that cannot be read, or not as they were written, are set aside as
        bad-STEP, with a warning.

        Args: state: the same pytree freshly initialised, or its ShapeDtypeStructs:
          gives structure, shapes, dtypes and shardings.
        Raises: UserError if the checkpoint does not fit `state`, or none can be read.
        """
        target = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
        with _disk_errors(self.folder):
            self._manager.wait_until_finished()
        steps = sorted(self._manager.all_steps(), reverse=True)
        bad: dict[int, Exception] = {}
        for one in steps if step is None else [step]:
            try:
                found = self._restore(target, one)
            except Exception as error:  # whatever Orbax says of damaged files
                bad[one] = error
            else:
                self._set_aside(bad, one)
                logging.info("restored step %d from %s", one, self.folder)
                return found
        newest = max(bad)
        if isinstance(bad[newest], UserError):
            raise bad[newest]
        raise UserError(
            f"{self.folder}: no checkpoint there can be read ({newest}: "
            f"{_one_line(bad[newest])}); delete the folder to begin anew"
        ) from bad[newest]

    def _restore(self, target: Any, step: int) -> tuple[Any, dict]:
        saved = self._manager.item_metadata(step)["state"].tree
        differs = _differences(_shapes(saved), _shapes(target))
        if differs:  # Orbax would say so too, after it has started reading
            raise UserError(
                f"checkpoint {self.folder}/{step} does not fit this config: {differs}; "
                "use another --workdir"
            )
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(target), data=ocp.args.JsonRestore()
            ),
        )
        state, data = restored["state"], restored["data"]
        _check_sums(data["checksums"], checksums(state))
        if data["checksum"] != _checksum_of_json(data["position"]):
            raise ValueError("the data position is not as it was written")
        return state, data["position"]

    def _set_aside(self, bad: dict[int, Exception], instead: int) -> None:
        for step, error in bad.items():
            logging.warning(
                "checkpoint %s/%d cannot be read (%s): going on from step %d",
                self.folder,
                step,
                _one_line(error),
                instead,
            )
            if processes.is_main_process():
                aside = self.folder / f"bad-{step}"
                shutil.rmtree(aside, ignore_errors=True)
                with _disk_errors(self.folder):
                    (self.folder / str(step)).rename(aside)
        if bad:
            processes.wait_for_all("bad checkpoints are set aside")
            self._manager.reload()

    def close(self) -> None:
        """Waits until every save is on disk."""
        with _disk_errors(self.folder):
            self._manager.wait_until_finished()
            self._manager.close()


def read_params(
    folder: pathlib.Path | str, step: int | None = None
) -> tuple[int, dict[str, Any]]:
    """Returns (step, the trained parameters as NumPy arrays) of a run's checkpoints.

    Works wherever the checkpoint was written: on any number of devices.

    Args: step: the newest one by default.
    Raises: UserError if there is no such checkpoint, or it is damaged.
    """
    folder = pathlib.Path(folder).absolute()
    steps = ocp.utils.checkpoint_steps(folder)
    if not steps or (step is not None and step not in steps):
        there = ", ".join(map(str, sorted(steps))) or "none"
        wanted = "a checkpoint" if step is None else f"step {step}"
        raise UserError(f"{folder}: has no {wanted}; steps there: {there}")
    step = max(steps) if step is None else step
    try:
        params = _read_params(folder / str(step))
    except Exception as error:  # whatever Orbax says of damaged files
        others = sorted(set(steps) - {step})
        fix = f"try --step={others[-1]}" if others else "there is no other"
        raise UserError(
            f"{folder}/{step} cannot be read ({_one_line(error)}); {fix}"
        ) from error
    return step, params


def _read_params(folder: pathlib.Path) -> dict[str, Any]:
    handler = ocp.PyTreeCheckpointHandler()
    saved = handler.metadata(folder / "state").tree["params"]
    args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), saved)
    restored = handler.restore(
        folder / "state",
        args=ocp.args.PyTreeRestore(
            item={"params": saved}, restore_args={"params": args}, partial_restore=True
        ),
    )
    handler.close()
    reader = ocp.JsonCheckpointHandler()
    data = reader.restore(folder / "data", args=ocp.args.JsonRestore())
    reader.close()
    found = checksums({"params": restored["params"]})
    _check_sums({name: data["checksums"][name] for name in found}, found)
    return restored["params"]


def checksums(tree: Any) -> dict[str, int]:
    """Returns {path: the sum of a leaf's bytes, in words of their own width}.

    The same however an array is divided over devices and processes; all of these call.
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    local = [sum(map(_words, _parts(leaf))) % 2**64 for _, leaf in leaves]
    total = processes.all_sum(np.asarray(local, np.uint64)) % 2**53  # exact in any JSON
    names = (_path(keys) for keys, _ in leaves)
    return dict(zip(names, map(int, total), strict=True))


def not_finite(params: Any) -> list[str]:
    """Returns the paths of arrays with a NaN or infinity; all processes call."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(params)
    bad = [not all(map(_finite, _parts(leaf))) for _, leaf in leaves]
    total = processes.all_sum(np.asarray(bad, np.uint64))
    return [_path(keys) for (keys, _), n in zip(leaves, total, strict=True) if n]


def _finite(part: np.ndarray) -> bool:
    return part.dtype.kind in "iub" or bool(np.isfinite(part).all())


def _parts(leaf: Any) -> list[np.ndarray]:
    """Returns the parts of an array that this process counts, each once."""
    if not isinstance(leaf, jax.Array):
        return [np.asarray(leaf)]
    shards = leaf.addressable_shards
    return [np.asarray(shard.data) for shard in shards if shard.replica_id == 0]


def _words(part: np.ndarray) -> int:
    width = min(part.dtype.itemsize, 8)
    bits = np.ascontiguousarray(part).reshape(-1).view(f"u{width}")
    return int(np.sum(bits, dtype=np.uint64))


def _check_sums(saved: dict[str, int], found: dict[str, int]) -> None:
    wrong = [name for name in found if saved.get(name) != found[name]]
    if wrong:
        raise ValueError(f"{wrong[0]} is not as it was written")


def _checksum_of_json(value: Any) -> int:
    return zlib.crc32(json.dumps(value, sort_keys=True).encode())


@contextlib.contextmanager
def _disk_errors(folder: pathlib.Path):
    """Says in one line what Orbax says in many of a disk that takes no more."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        for code in files.CURES:
            if os.strerror(code) in str(error) or getattr(error, "errno", 0) == code:
                said = files.describe_disk_error(
                    OSError(code, os.strerror(code)), folder
                )
                raise DiskError(said) from error
        raise


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) < 160 else text[:150] + " ..."


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    """Returns "params/a/kernel" -> shape; the same for a state and its metadata."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {_path(keys): tuple(leaf.shape) for keys, leaf in leaves}


def _path(keys) -> str:
    names = ("name", "key", "idx")
    return "/".join(
        str(next(getattr(k, n) for n in names if hasattr(k, n))) for k in keys
    )


def _differences(saved: dict, wanted: dict) -> str:
    parts = []
    for what, names in (
        ("missing", sorted(wanted.keys() - saved.keys())),
        ("unexpected", sorted(saved.keys() - wanted.keys())),
    ):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            parts.append(f"{what} {', '.join(names[:3])}{more}")
    for name in sorted(wanted.keys() & saved.keys()):
        if wanted[name] != saved[name]:
            parts.append(f"{name} is {list(saved[name])}, not {list(wanted[name])}")
            break
    return "; ".join(parts)
