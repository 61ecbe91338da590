# SPDX-License-Identifier: Apache-2.0
"""A run's folder: its config.json, its log and its lock."""

import contextlib
import json
import logging as std_logging
import pathlib
from typing import Any

import filelock
from absl import logging
from ml_collections import ConfigDict

from gift_jax.runtime import files
from gift_jax.runtime.config import flatten
from gift_jax.runtime.errors import UserError

# Fields, and groups of fields, that a resumed run may change without becoming another
# run: its length, the pace of its logs and checkpoints, the hardware, and what is
# looked at after it.
RESUMABLE_FIELDS = ("steps", "log_every", "checkpoints", "hardware", "verify")
RESUMABLE_FIELDS += ("checkpoint_every", "cpu_devices")  # of configs without groups

_LOCK = ".lock"
_held: dict[pathlib.Path, filelock.BaseFileLock] = {}


def lock(folder: pathlib.Path) -> None:
    """Locks a folder for this process, and releases the one it had locked before.

    The system drops the lock of a process that ends, however it ends.

    Raises: UserError if another process has the lock; OSError if the folder cannot be
      written.
    """
    for old in list(_held):
        _held.pop(old).release()
    folder.mkdir(parents=True, exist_ok=True)
    folder_lock = filelock.FileLock(folder / _LOCK, timeout=0)
    try:
        folder_lock.acquire()
    except filelock.Timeout:
        raise UserError(
            f"--workdir={folder} is in use by another process; wait for it, stop it, "
            "or use another folder"
        ) from None
    except NotImplementedError:
        logging.warning("%s: this file system has no locks; run one process", folder)
        return
    _held[folder] = folder_lock


def prepare_workdir(
    cfg: ConfigDict, workdir: pathlib.Path, base: str = ""
) -> pathlib.Path:
    """Creates the run's folder with config.json and log.txt, or checks that it fits.

    Of several processes the first one writes.

    Args: base: content hash of the model that the run starts from; recorded, and
      compared when the run is resumed, since the model may have moved to another
      folder.
    Raises: UserError if the folder belongs to a run of another config (all but
      `RESUMABLE_FIELDS` must be equal) or cannot be written.
    """
    from gift_jax.runtime import processes  # imports jax: --help need not wait for it

    if processes.is_main_process():
        with _writing(workdir):
            lock(workdir)
    path = workdir / "config.json"
    new = _recorded(cfg, base)
    if path.exists():
        _check_same_run(path, new)
    if not processes.is_main_process():
        return workdir
    with _writing(workdir):
        files.write_json(path, new)
    log_to_file(workdir)
    logging.info("config %s", path)
    return workdir


def check_workdir(cfg: ConfigDict, workdir: pathlib.Path, *, base: str = "") -> None:
    """Raises UserError if the folder belongs to a run of another config.

    `prepare_workdir` does, too: this is for before the work that comes before it.
    """
    path = workdir / "config.json"
    if path.exists():
        _check_same_run(path, _recorded(cfg, base))


def _recorded(cfg: ConfigDict, base: str) -> dict[str, Any]:
    """Returns what a run's config.json holds."""
    recorded = json.loads(json.dumps(cfg.to_dict()))
    recorded.get("hardware", {}).pop("processes", None)  # differs between those of one
    return recorded | {"base_sha256": base} if base else recorded


def phase_folders(workdir: pathlib.Path) -> list[pathlib.Path]:
    """Returns the folders of a run's later phases; another run has a config.json."""
    folders = (path.parent for path in sorted(workdir.glob("*/metrics.jsonl")))
    return [folder for folder in folders if not (folder / "config.json").exists()]


def _check_same_run(path: pathlib.Path, new: dict) -> None:
    """Raises UserError if a folder's config.json is that of another run."""
    try:
        old = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}); delete it") from error
    base = new.get("base_sha256")
    if base and old.get("base_sha256") == base and "model" in new:
        old["model"] = new["model"]  # the same content in another folder
    changed = config_diff(old, new)
    if changed:
        raise UserError(
            f"--workdir={path.parent} holds a run of another config ({changed}); "
            "use another folder, or delete this one"
        )


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


def config_diff(old: dict, new: dict, *, finished: bool = False) -> str:
    """Returns the first fields in which two configs' dicts differ, in words, or "".

    `RESUMABLE_FIELDS` may differ, the number of steps only of an unfinished run.
    """
    old, new = flatten(old), flatten(new)
    changed = [
        f"{path} was {old.get(path)}, is {new.get(path)}"
        for path in sorted(old.keys() | new.keys())
        if old.get(path) != new.get(path) and not _is_resumable(path, finished)
    ]
    return "; ".join(changed[:3]) + (" ..." if len(changed) > 3 else "")


def _is_resumable(path: str, finished: bool) -> bool:
    names = path.split(".")
    if names[-1] == "steps":
        return len(names) == 1 and not finished  # the run's; not a sampler's
    return not set(names).isdisjoint(RESUMABLE_FIELDS)
