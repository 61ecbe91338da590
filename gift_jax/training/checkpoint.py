# SPDX-License-Identifier: Apache-2.0
"""Orbax checkpoints of what changes in a run: its state and the position in its data.

A checkpoint holds the `State` (trained parameters, optimizer states, step), the run's
key and the data iterators' position, with checksums. The frozen base model is recorded
in the run's config.json, by path and content hash.
"""

import contextlib
import os
import pathlib
import shutil
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging

from gift_jax.runtime import files, processes
from gift_jax.runtime.errors import DiskError, UserError
from gift_jax.training import checksums


class _Manager(ocp.CheckpointManager):
    def reached_preemption(self, step: int) -> bool:
        """Returns False: the loop asks at each step, through `processes.preempted`.

        Orbax asks again when a save in the background ends, with that save's step. If
        SIGTERM arrived meanwhile, the processes agreed on a step that this one had
        passed already, and waited for one another forever.
        """
        return False


class Checkpoints:
    """The checkpoints of one run; saving is asynchronous and atomic.

    Args: folder: created if missing. keep: how many to keep. every: `due` at multiples
      of so many steps; 0: never.
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
        """Returns the newest complete checkpoint's step, or None."""
        return self._manager.latest_step()

    def due(self, step: int) -> bool:
        """Whether the schedule has a checkpoint after `step`."""
        return self.every > 0 and step % self.every == 0

    def save(self, step: int, state: Any, position: dict[str, Any]) -> None:
        """Saves a pytree of arrays and a JSON value as step `step`, if not yet there.

        Raises: DiskError if the disk is full or cannot be written, perhaps only when
          the next one is saved or the store is closed.
        """
        if step == self._manager.latest_step():
            return
        data = {
            "position": position,
            "checksum": checksums.of_json(position),
            "checksums": checksums.of_tree(state),
        }
        with _disk_errors(self.folder):
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state), data=ocp.args.JsonSave(data)
                ),
                force=True,
            )

    def restore(self, state: Any, step: int | None = None) -> tuple[Any, dict]:
        """Returns (state, position) of `step`, by default of the newest intact one.

        Newer ones that are damaged are renamed to bad-STEP, with a warning.

        Args: state: a pytree of arrays or ShapeDtypeStructs with the structure, shapes,
          dtypes and shardings to restore.
        Raises: UserError if the checkpoint does not fit `state`, or none is intact.
        """
        target = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
        with _disk_errors(self.folder):
            self._manager.wait_until_finished()
        steps = sorted(self._manager.all_steps(), reverse=True)
        damaged: dict[int, Exception] = {}
        for candidate in steps if step is None else [step]:
            try:
                result = self._restore(target, candidate)
            except Exception as error:  # whatever Orbax raises of damaged files
                damaged[candidate] = error
            else:
                self._set_aside(damaged, candidate)
                logging.info("restored step %d from %s", candidate, self.folder)
                return result
        newest = max(damaged)
        if isinstance(damaged[newest], UserError):
            raise damaged[newest]
        raise UserError(
            f"{self.folder}: no checkpoint there can be read ({newest}: "
            f"{_one_line(damaged[newest])}); delete the folder to begin anew"
        ) from damaged[newest]

    def _restore(self, target: Any, step: int) -> tuple[Any, dict]:
        saved = self._manager.item_metadata(step)["state"].tree
        differences = _differences(_shapes(saved), _shapes(target))
        if differences:  # Orbax would raise too, but only after it has begun to read
            raise UserError(
                f"checkpoint {self.folder}/{step} does not fit this config: "
                f"{differences}; use another --workdir"
            )
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(target), data=ocp.args.JsonRestore()
            ),
        )
        state, data = restored["state"], restored["data"]
        checksums.check(data["checksums"], state)
        if data["checksum"] != checksums.of_json(data["position"]):
            raise ValueError("the data position is not as it was written")
        return state, data["position"]

    def _set_aside(self, damaged: dict[int, Exception], good_step: int) -> None:
        for step, error in damaged.items():
            message = "checkpoint %s/%d cannot be read (%s): going on from step %d"
            logging.warning(message, self.folder, step, _one_line(error), good_step)
            if processes.is_main_process():
                aside = self.folder / f"bad-{step}"
                shutil.rmtree(aside, ignore_errors=True)
                with _disk_errors(self.folder):
                    (self.folder / str(step)).rename(aside)
        if damaged:
            processes.wait_for_all("damaged checkpoints are renamed")
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

    Works on any number of devices, whatever number wrote the checkpoint.

    Args: step: the newest one by default.
    Raises: UserError if there is no such checkpoint, or it is damaged.
    """
    folder = pathlib.Path(folder).absolute()
    steps = ocp.utils.checkpoint_steps(folder)
    if not steps or (step is not None and step not in steps):
        present = ", ".join(map(str, sorted(steps))) or "none"
        missing = "a checkpoint" if step is None else f"step {step}"
        raise UserError(f"{folder}: has no {missing}; steps there: {present}")
    step = max(steps) if step is None else step
    try:
        params = _read_params(folder / str(step))
    except Exception as error:  # whatever Orbax raises of damaged files
        others = sorted(set(steps) - {step})
        fix = f"try --step={others[-1]}" if others else "there is no other"
        raise UserError(
            f"{folder}/{step} cannot be read ({_one_line(error)}); {fix}"
        ) from error
    return step, params


def _read_params(folder: pathlib.Path) -> dict[str, Any]:
    with contextlib.closing(ocp.PyTreeCheckpointHandler()) as handler:
        saved = handler.metadata(folder / "state").tree["params"]
        args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), saved)
        restored = handler.restore(
            folder / "state",
            args=ocp.args.PyTreeRestore(
                item={"params": saved},
                restore_args={"params": args},
                partial_restore=True,
            ),
        )
    with contextlib.closing(ocp.JsonCheckpointHandler()) as handler:
        data = handler.restore(folder / "data", args=ocp.args.JsonRestore())
    checksums.check(data["checksums"], {"params": restored["params"]})
    return restored["params"]


@contextlib.contextmanager
def _disk_errors(folder: pathlib.Path):
    """Raises a DiskError of one line where Orbax raises many of a full disk."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        for code in files.CURES:
            reason = os.strerror(code)
            if reason in str(error) or getattr(error, "errno", 0) == code:
                message = files.describe_disk_error(OSError(code, reason), folder)
                raise DiskError(message) from error
        raise


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) < 160 else text[:150] + " ..."


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    """Returns {path: shape}; the same for a state and its checkpoint's metadata."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {checksums.tree_path(keys): tuple(leaf.shape) for keys, leaf in leaves}


def _differences(saved: dict, expected: dict) -> str:
    parts = []
    for what, names in (
        ("missing", sorted(expected.keys() - saved.keys())),
        ("unexpected", sorted(saved.keys() - expected.keys())),
    ):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            parts.append(f"{what} {', '.join(names[:3])}{more}")
    for name in sorted(expected.keys() & saved.keys()):
        if expected[name] != saved[name]:
            parts.append(f"{name} is {list(saved[name])}, not {list(expected[name])}")
            break
    return "; ".join(parts)
