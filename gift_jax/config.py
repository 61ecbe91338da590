# SPDX-License-Identifier: Apache-2.0
"""Reading, overriding and checking ml_collections configs; the command lines' frame.

Every mistake of the user ends as one line on stderr that names the field, the value,
the rule and the fix, and exit code 2.
"""

import argparse
import contextlib
import difflib
import importlib.metadata
import importlib.util
import json
import logging as std_logging
import math
import os
import pathlib
import reprlib
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn

from absl import flags as absl_flags
from absl import logging
from ml_collections import ConfigDict, config_dict

import gift_jax

LARGEST = 2**31 - 1  # of a config's whole numbers: JAX counts in 32 bits
_SHOWN = 120  # characters of a wrong value in its message


class UserError(ValueError):
    """A mistake in the config, flags or input: one line on stderr, exit code 2.

    What would break or garble the line, such as in a file's name, is escaped.
    """

    def __init__(self, message: str):
        super().__init__(escaped(message))


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")


def parser(doc: str, program: str) -> argparse.ArgumentParser:
    """Returns an argument parser whose mistakes are UserErrors."""
    return _Parser(
        prog=f"python -m gift_jax.{program}",
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def parse(
    argv: Sequence[str] | None, doc: str, program: str
) -> tuple[ConfigDict, pathlib.Path]:
    """Returns (the config with its overrides, the workdir) of a command line.

    Reads --config FILE[:variant], --workdir DIR and --config.field=value ...; the
    config is locked, so an unknown field is an error. With --help, the fields of the
    config given are listed too.
    """
    flags = parser(doc, program)
    flags.add_argument("--workdir", required=True, help="the run's folder")
    flags.epilog = "Running the same command again resumes."
    cfg, args = parse_config(argv, flags, program)
    return cfg, pathlib.Path(args.workdir)


def parse_config(
    argv: Sequence[str] | None, flags: argparse.ArgumentParser, program: str
) -> tuple[ConfigDict, argparse.Namespace]:
    """Returns (the config with its overrides, the other flags) of a command line.

    Args: flags: from `parser`, with what the command has besides. program: whose
      configs are taken: train, attack, evaluate, benchmark or pretrain.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    flags.add_argument(
        "--config", required=True, metavar="FILE[:VARIANT]", help="a Python config file"
    )
    flags.epilog = (
        "Any field of the config can be set: --config.steps=200, "
        f"--config.lower.lr=1e-5. {flags.epilog or ''}"
    )
    named = [a.split("=", 1)[1] for a in argv if a.startswith("--config=")]
    named += [b for a, b in zip(argv, argv[1:], strict=False) if a == "--config"]
    if named and {"-h", "--help"} & set(argv):
        fields = json.dumps(load(named[0]).to_dict(), indent=2)
        flags.epilog += f"\n\nFields of {named[0]} and their values:\n{fields}"
    overrides = [a for a in argv if a.startswith("--config.")]
    args = flags.parse_args([a for a in argv if a not in overrides])
    cfg = load(args.config, program)
    for override in overrides:
        _override(cfg, override.removeprefix("--config."))
    return cfg, args


# What the configs of one command have and those of no other.
_MARKS = {
    "train": "harmful",
    "attack": "lora",
    "evaluate": "references",
    "benchmark": "methods",
    "pretrain": "clip",
}


def _check_is_of(program: str, cfg: ConfigDict, spec: str) -> None:
    """Raises a UserError if a config is one of another command."""
    if program in _MARKS and _MARKS[program] not in cfg:
        fitting = [name for name, mark in _MARKS.items() if mark in cfg]
        hint = f"; it is one of gift_jax.{fitting[0]}" if fitting else ""
        raise UserError(
            f"--config={spec} is no config of gift_jax.{program}: it has no field "
            f"{_MARKS[program]!r}{hint}"
        )


def load(spec: str, program: str = "") -> ConfigDict:
    """Returns the locked config of FILE or FILE:variant.

    Args: program: whose config it must be, see `parse_config`; "": any.
    Raises: UserError if there is no such file or variant, or it has no get_config.
    """
    path, _, variant = spec.partition(":")
    file = pathlib.Path(path)
    if not os.path.isfile(file):  # unlike pathlib's, of any name
        raise UserError(
            f"--config={one_line(path)} is no file; try configs/emoji_gift.py"
        )
    module_spec = importlib.util.spec_from_file_location(f"config_{file.stem}", file)
    if module_spec is None or module_spec.loader is None:
        raise UserError(f"--config={path} is no Python file")
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
    except SyntaxError as error:
        raise UserError(f"--config={path}, line {error.lineno}: {error.msg}") from error
    except ValueError as error:  # such as null characters
        raise UserError(f"--config={path} cannot be read: {error}") from error
    if not hasattr(module, "get_config"):
        raise UserError(f"--config={path} defines no get_config(variant)")
    try:
        cfg = module.get_config(variant)
    except ValueError as error:
        raise UserError(f"--config={one_line(spec)}: {error}") from error
    if not isinstance(cfg, ConfigDict):
        raise UserError(
            f"--config={path}: get_config returns a {type(cfg).__name__}; must be a "
            "ConfigDict"
        )
    _check_is_of(program, cfg, spec)
    return cfg.lock()


def variant(config: ConfigDict, name: str, **variants: dict[str, Any]) -> ConfigDict:
    """Applies the named variant's overrides ("a.b": value); an unknown name raises."""
    if not name:
        return config
    if name not in variants:
        choices = ", ".join(variants) or "none"
        raise ValueError(f"unknown variant {name!r}; choices: {choices}")
    config.update_from_flattened_dict(variants[name])
    return config


def choice(field: str, value: str, choices: Sequence[str]) -> str:
    """Returns value if it is one of choices, else raises a UserError listing them."""
    if value in choices:
        return value
    word = value[:_SHOWN] if isinstance(value, str) else ""
    close = difflib.get_close_matches(word, choices, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    listed = ", ".join(choices[:12]) + (" ..." if len(choices) > 12 else "")
    raise UserError(f"{field}={shown(value)} is not one of: {listed}{hint}")


def at_least(field: str, value: float, low: float) -> None:
    """Raises a UserError unless value >= low, and a number that can be counted to."""
    _check_number(field, value, low)
    if value < low:
        raise UserError(f"{field}={value} must be at least {low}; try {field}={low}")


def above(field: str, value: float, low: float, fix: float) -> None:
    """Raises a UserError unless value > low; fix: what to try."""
    _check_number(field, value, fix)
    if value <= low:
        raise UserError(f"{field}={value} must be above {low}; try {field}={fix}")


def between(field: str, value: float, low: float, high: float) -> None:
    """Raises a UserError unless low <= value <= high."""
    at_least(field, value, low)
    if value > high:
        raise UserError(f"{field}={value} must be at most {high}; try {field}={high}")


def _check_number(field: str, value: float, fix: float) -> None:
    if not isinstance(value, (int, float)):
        raise UserError(f"{field}={shown(value)} must be a number; try {field}={fix}")
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{field}={value} must be finite; try {field}={fix}")
    if isinstance(value, int) and abs(value) > LARGEST:
        raise UserError(f"{field}={shown(value)} must be at most {LARGEST} from 0")


def shown(value: Any) -> str:
    """Returns what a message says of a value: one line, not too long, in quotes."""
    if not isinstance(value, str):
        return reprlib.repr(value)
    more = f" ... ({len(value)} characters)" if len(value) > _SHOWN else ""
    return repr(value[:_SHOWN]) + more


def one_line(text: Any) -> str:
    """Returns a path or a name as a message has it: what would garble a line escaped.

    A very long one loses its middle.
    """
    text = str(text)
    if len(text) > 4 * _SHOWN:
        text = f"{text[: 2 * _SHOWN]} ... {text[-2 * _SHOWN :]}"
    return escaped(text)


def escaped(text: str) -> str:
    """Returns a text, line ends and other control characters as Python writes them."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


class RepeatsError(ValueError):
    """A name that appears twice."""


def check_once(names: Iterable[str]) -> None:
    """Raises RepeatsError naming the first name that appears twice."""
    seen = set()
    for name in names:
        if name in seen:
            raise RepeatsError(f"{shown(name)} appears twice")
        seen.add(name)


def parse_json(text: str) -> Any:
    """Returns what JSON of a stranger says; ValueError where it says a name twice."""

    def once(items):
        check_once(name for name, _ in items)
        return dict(items)

    return json.loads(text, object_pairs_hook=once)


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
    from gift_jax import files, hosts  # imports jax, which --help need not wait for

    if hosts.is_first():
        with _writing(workdir):
            files.lock(workdir)
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
        changed = differences(old, new)
        if changed:
            raise UserError(
                f"--workdir={workdir} holds a run of another config ({changed}); "
                "use another folder, or delete this one"
            )
    if not hosts.is_first():
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


def run_main(main: Callable[[], int]) -> NoReturn:
    """Runs a command line's main and exits: 0 done, 2 a mistake, 128+n a signal."""
    from gift_jax import files, heap, loop, stopping  # they import jax

    heap.keep()  # before there are threads
    _log_to_stderr()
    stopping.watch()
    try:
        code = main()
    except files.DiskError as error:
        _end_at_once(str(error))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    except stopping.StoppedBySignal as event:
        print(f"{event}; run the same command to go on", file=sys.stderr)
        code = event.exit_code
    except loop.NonFiniteError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 3
    except OSError as error:
        said = files.told(error)
        if said is None:
            raise
        _end_at_once(said)
    except KeyboardInterrupt:
        code = 130
    sys.exit(code)


def _end_at_once(error: str) -> NoReturn:
    """Exits without the goodbyes of other threads, which would want the disk too."""
    print(f"error: {error}", file=sys.stderr)
    sys.stderr.flush()
    os._exit(2)


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


def versions() -> dict[str, str]:
    """Returns the versions that numbers may depend on, for results files."""
    names = "jax", "jaxlib", "flax", "optax", "diffusers", "numpy"
    found = {name: importlib.metadata.version(name) for name in names}
    return {"gift_jax": gift_jax.__version__, **found}


def _log_to_stderr() -> None:
    absl_flags.FLAGS.mark_as_parsed()  # or absl's first line says that they are not
    logging.use_absl_handler()
    logging.set_verbosity(logging.INFO)
    logging.get_absl_handler().setFormatter(std_logging.Formatter("%(message)s"))
    logging.get_absl_logger().addFilter(_ours_or_serious)  # for log.txt too
    logging.get_absl_handler().addFilter(_ours_or_serious)  # JAX has its own loggers
    sys.unraisablehook = _print_unraisable


def _print_unraisable(event) -> None:
    # TensorStore says this of a write that failed, besides raising what failed.
    if str(event.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(event)


def _ours_or_serious(record: std_logging.LogRecord) -> bool:
    # Orbax logs twenty lines a checkpoint through the same logger.
    if "gift_jax" in pathlib.Path(record.pathname).parts:
        return True
    harmless = "Skipping merge of OCDBT" in str(record.msg)  # none was asked for
    # What threads of Orbax's log with a traceback is raised where one waits for it.
    harmless |= bool(record.exc_info)
    return record.levelno >= std_logging.WARNING and not harmless


def _override(cfg: ConfigDict, text: str) -> None:
    field, equals, value = text.partition("=")
    if not equals:
        text = one_line(text)
        raise UserError(f"--config.{text} needs a value: --config.{text}=VALUE")
    *parents, name = field.split(".")
    node = cfg
    for part in parents:
        node = node[part] if part in node else None
        if not isinstance(node, ConfigDict):
            raise UserError(_unknown(cfg, field))
    if name not in node:
        raise UserError(_unknown(cfg, field))
    old = node[name]
    if isinstance(old, ConfigDict):
        some = f"config.{field}.{next(iter(old), 'NAME')}"
        raise UserError(
            f"config.{field}={shown(value)} must be of a field, not of a group of "
            f"them; name one, such as {some}"
        )
    try:
        new = _typed(old, value)
    except (ValueError, TypeError) as error:
        kind, was = type(old).__name__, str(old).replace("'", "")
        kind += f" of {type(old[0]).__name__}" if isinstance(old, tuple) and old else ""
        raise UserError(
            f"config.{field}={shown(value)} must be of type {kind}; try "
            f"--config.{field}={was}"
        ) from error
    for number in new if isinstance(new, tuple) else (new,):
        if isinstance(number, (int, float)):
            _check_number(f"config.{field}", number, old)
    node[name] = new


def _typed(old: Any, value: str) -> Any:
    if isinstance(old, bool):
        words = {"true": True, "1": True, "false": False, "0": False}
        return words[value.lower()] if value.lower() in words else _raise(value)
    if isinstance(old, int):
        return int(value)
    if isinstance(old, float):
        return float(value)
    if isinstance(old, tuple):
        items = [item for item in value.strip("()[]").split(",") if item.strip()]
        kind = type(old[0]) if old else str
        return tuple(kind(item.strip()) for item in items)
    return value


def _raise(value: str) -> NoReturn:
    raise ValueError(value)


def _unknown(cfg: ConfigDict, field: str) -> str:
    known = list(cfg.to_dict() if not cfg else _flat(cfg.to_dict()))
    close = difflib.get_close_matches(field[:_SHOWN], known, n=1, cutoff=0.5)
    hint = (
        f"did you mean config.{close[0]}?" if close else f"fields: {', '.join(known)}"
    )
    return f"config.{one_line(field[:_SHOWN])} is no field of this config; {hint}"


def _flat(tree: dict, prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


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


def differences(old: dict, new: dict, *, finished: bool = False) -> str:
    """Returns the first fields in which two configs' dicts differ, in words, or "".

    What sets a run's pace may differ, and the number of steps unless it is `finished`.
    A field that `old` is too old to have is what it meant then.
    """
    old, new = _flat(old), _flat(new)
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


__all__ = [
    "LARGEST",
    "ConfigDict",
    "UserError",
    "above",
    "at_least",
    "between",
    "choice",
    "config_dict",
    "differences",
    "load",
    "log_to_file",
    "one_line",
    "parse",
    "parser",
    "prepare_workdir",
    "run_main",
    "shown",
    "variant",
    "versions",
]
