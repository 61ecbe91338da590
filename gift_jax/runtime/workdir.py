# SPDX-License-Identifier: Apache-2.0
"""A run's folder: its config.json, its log and its lock."""

import contextlib
import json
import logging as std_logging
import pathlib

import filelock
from absl import logging
from ml_collections import ConfigDict

from gift_jax.runtime.config import flatten
from gift_jax.runtime.errors import UserError

_LOCK = ".lock"
_held: dict[pathlib.Path, filelock.BaseFileLock] = {}


def lock(folder: pathlib.Path) -> None:
    """Makes this process the only one that works in a folder, until it does in another.

    The system drops the lock of a process that ends, however it ends.

    Raises: UserError if another process has it; OSError if it cannot be written.
    """
    for old in list(_held):
        _held.pop(old).release()
    folder.mkdir(parents=True, exist_ok=True)
    mine = filelock.FileLock(folder / _LOCK, timeout=0)
    try:
        mine.acquire()
    except filelock.Timeout:
        raise UserError(
            f"--workdir={folder} is in use by another process; wait for it, stop it, "
            "or use another folder"
        ) from None
    except NotImplementedError:
        logging.warning("%s: this file system has no locks; run one process", folder)
        return
    _held[folder] = mine


def prepare_workdir(
    cfg: ConfigDict, workdir: pathlib.Path, base: str = ""
) -> pathlib.Path:
    """Creates the run's folder with config.json and log.txt, or checks that it fits.

    Of several processes the first one writes.

    Args: base: content hash of the model that the run starts from; recorded, and
      compared when the run is resumed, for then it may lie in another folder.
    Raises: UserError if the folder belongs to a run of another config (the number of
      steps and the pace of logging may change) or cannot be written.
    """
    from gift_jax.runtime import (
        files,
        processes,  # imports jax, which --help need not wait for
    )

    if processes.is_main_process():
        with _writing(workdir):
            lock(workdir)
    path = workdir / "config.json"
    new = json.loads(json.dumps(cfg.to_dict()))
    new.pop("processes", None)  # each has its own
    if base:
        new["base_sha256"] = base
    if path.exists():
        try:
            old = json.loads(path.read_text())
        except ValueError as error:
            raise UserError(f"{path} is not valid JSON ({error}); delete it") from error
        if base and old.get("base_sha256") == base and "model" in new:
            old["model"] = new["model"]  # the same, wherever it lies
        changed = config_diff(old, new)
        if changed:
            raise UserError(
                f"--workdir={workdir} holds a run of another config ({changed}); "
                "use another folder, or delete this one"
            )
    if not processes.is_main_process():
        return workdir
    with _writing(workdir):
        files.write_json(path, new)
    log_to_file(workdir)
    logging.info("config %s", json.dumps(new, sort_keys=True))
    return workdir


@contextlib.contextmanager
def _writing(workdir: pathlib.Path):
    try:
        yield
    except OSError as error:
        raise UserError(f"--workdir={workdir} cannot be written: {error}") from error


def log_to_file(workdir: pathlib.Path) -> None:
    """From now on, the log goes to the folder's log.txt."""
    workdir.mkdir(parents=True, exist_ok=True)
    logger = logging.get_absl_logger()
    for old in [h for h in logger.handlers if isinstance(h, std_logging.FileHandler)]:
        logger.removeHandler(old)  # of an earlier run of this process
        old.close()
    handler = std_logging.FileHandler(workdir / "log.txt")
    handler.setFormatter(std_logging.Formatter("%(asctime)s %(message)s"))
    logger.addHandler(handler)


# Fields that a resumed run may change without becoming another run.
_PACE = ("steps", "log_every", "checkpoint_every", "keep", "name")
_PACE += ("on_nan", "nan_retries")
_MACHINE = ("cpu_devices", "mesh", "shard_frozen", "accumulate", "processes")
_MACHINE += ("attention", "remat")
# Fields that configs of earlier versions lack: what they meant; None: nothing.
_ADDED = {"identifier_prompts": 0.0, "identifier_template": None}
_ADDED |= {"gift.preserve": "data", "gift.safe_limit": 0.0}


def _is_pace(name: str, finished: bool) -> bool:
    *parents, last = name.split(".")
    if {*parents, last} & set(_MACHINE):
        return True
    if last == "steps" and (finished or name.startswith("samples.")):
        return False
    return last in _PACE


def config_diff(old: dict, new: dict, *, finished: bool = False) -> str:
    """Returns the first fields in which two configs' dicts differ, in words, or "".

    What sets a run's pace may differ, and the number of steps unless it is `finished`.
    A field that `old` is too old to have is what it meant then.
    """
    old, new = flatten(old), flatten(new)
    for name in new.keys() - old.keys():
        for field, meant in _ADDED.items():
            if f".{name}".endswith(f".{field}"):
                old[name] = new[name] if meant is None else meant
    changed = [
        f"{name} was {old.get(name)}, is {new.get(name)}"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name) and not _is_pace(name, finished)
    ]
    return "; ".join(changed[:3]) + (" ..." if len(changed) > 3 else "")
