# SPDX-License-Identifier: Apache-2.0
"""Orbax checkpoints: trainable state and data position together, resumed together.

A checkpoint holds what changes (trainable parameters, optimiser states, step, key)
and the data iterators' position. The frozen base model is only referred to, by path
and content hash, in the run's config.json.
"""

import json
import pathlib
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging

from gift_jax.config import UserError


class Checkpoints:
    """The checkpoints of one run, newest last; saving is asynchronous and atomic.

    Args: folder: created if missing. keep: how many to keep. every: save at steps
      that are multiples of it; `save(..., force=True)` saves at any step.
    """

    def __init__(self, folder: pathlib.Path | str, *, keep: int = 2, every: int = 100):
        self.folder = pathlib.Path(folder).absolute()
        self.every = every
        self._manager = ocp.CheckpointManager(
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
        """Saves state (a pytree of arrays) and the data position as step `step`."""
        if step == self._manager.latest_step():
            return
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state), data=ocp.args.JsonSave(data_state)
            ),
            force=True,
        )

    def restore(self, state: Any, step: int | None = None) -> tuple[Any, dict]:
        """Returns (state, data position) of `step`, by default of the newest one.

        Args: state: the same pytree freshly initialised: gives structure, shapes,
          dtypes and shardings.
        Raises: UserError if the checkpoint does not fit `state`.
        """
        step = self.latest_step() if step is None else step
        target = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
        self._manager.wait_until_finished()
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
        logging.info("restored step %d from %s", step, self.folder)
        return restored["state"], restored["data"]

    def close(self) -> None:
        """Waits until every save is on disk."""
        self._manager.wait_until_finished()
        self._manager.close()


def read_params(
    folder: pathlib.Path | str, step: int | None = None
) -> tuple[int, dict[str, Any]]:
    """Returns (step, the trained parameters as NumPy arrays) of a run's checkpoints.

    Works wherever the checkpoint was written: on any number of devices.

    Args: step: the newest one by default.
    Raises: UserError if there is no such checkpoint.
    """
    folder = pathlib.Path(folder).absolute()
    steps = ocp.utils.checkpoint_steps(folder)
    if not steps or (step is not None and step not in steps):
        there = ", ".join(map(str, sorted(steps))) or "none"
        wanted = "a checkpoint" if step is None else f"step {step}"
        raise UserError(f"{folder}: has no {wanted}; steps there: {there}")
    step = max(steps) if step is None else step
    state = folder / str(step) / "state"
    handler = ocp.PyTreeCheckpointHandler()
    saved = handler.metadata(state).tree["params"]
    args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), saved)
    restored = handler.restore(
        state,
        args=ocp.args.PyTreeRestore(
            item={"params": saved}, restore_args={"params": args}, partial_restore=True
        ),
    )
    handler.close()
    return step, restored["params"]


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


def write_json(path: pathlib.Path, value: Any) -> None:
    """Writes JSON aside and renames it, so that a reader never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n")
    temporary.replace(path)
