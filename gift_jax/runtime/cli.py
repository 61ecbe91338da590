# SPDX-License-Identifier: Apache-2.0
"""The frame of every command line: flags, logging, exit codes."""

import argparse
import itertools
import json
import logging as std_logging
import os
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from absl import flags as absl_flags
from absl import logging
from ml_collections import ConfigDict

import gift_jax
from gift_jax.runtime import files, malloc, signals
from gift_jax.runtime.config import load_config, override
from gift_jax.runtime.errors import CommandExit, DiskError, StoppedBySignal, UserError

_PACKAGE = pathlib.Path(gift_jax.__file__).parent


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


# the config -> (field=value, its meaning) of its fields
Describe = Callable[[ConfigDict], list[tuple[str, str]]]


def parse(
    argv: Sequence[str] | None,
    doc: str,
    program: str,
    describe: Describe | None = None,
) -> tuple[ConfigDict, pathlib.Path]:
    """Returns (the config with its overrides, the workdir) of a command line.

    Reads --config FILE[:variant], --workdir DIR and --config.field=value ...; the
    config is locked, so an unknown field is an error. With --help, the fields of the
    config given are listed too, as `describe` says.
    """
    flags = parser(doc, program)
    flags.add_argument("--workdir", required=True, help="the run's folder")
    flags.epilog = "Running the same command again resumes."
    cfg, args = parse_config(argv, flags, program, describe)
    return cfg, pathlib.Path(args.workdir)


def parse_config(
    argv: Sequence[str] | None,
    flags: argparse.ArgumentParser,
    program: str,
    describe: Describe | None = None,
) -> tuple[ConfigDict, argparse.Namespace]:
    """Returns (the config with its overrides, the other flags) of a command line.

    Args: flags: from `parser`, with the command's other flags. program: the command
      that the config must be for: train, attack, evaluate, benchmark or pretrain.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    flags.add_argument(
        "--config", required=True, metavar="FILE[:VARIANT]", help="a Python config file"
    )
    flags.epilog = (
        "Any field of the config can be set: --config.steps=200, "
        "--config.lower.lr=1e-5, several values as --config.harmful.names=bomb,gear, "
        """several prompts as --config.samples.prompts='["a cat, 4k", "a dog"]'. """
        f"{flags.epilog or ''}"
    )
    specs = [a.split("=", 1)[1] for a in argv if a.startswith("--config=")]
    specs += [b for a, b in itertools.pairwise(argv) if a == "--config"]
    if specs and {"-h", "--help"} & set(argv):
        fields = _describe_fields(load_config(specs[0], program), describe)
        flags.epilog += f"\n\nFields of {specs[0]} and their values:\n{fields}"
    overrides = [a for a in argv if a.startswith("--config.")]
    args = flags.parse_args([a for a in argv if a not in overrides])
    cfg = load_config(args.config, program)
    for text in overrides:
        override(cfg, text.removeprefix("--config."))
    return cfg, args


def _describe_fields(cfg: ConfigDict, describe: Describe | None) -> str:
    if describe is None:
        return json.dumps(cfg.to_dict(), indent=2)
    rows = [(f"--{field}", meaning) for field, meaning in describe(cfg)]
    return "\n".join(f"  {field}\n      {meaning}" for field, meaning in rows)


def run_main(main: Callable[[], int]) -> NoReturn:
    """Runs a command's main and exits with its code, or that of a `CommandExit`."""
    malloc.retain_freed_memory()  # before there are threads
    log_to_stderr()
    signals.flag.install()
    try:
        code = main()
    except DiskError as error:
        _exit_at_once(error)
    except StoppedBySignal as event:
        print(f"{event}; run the same command to go on", file=sys.stderr)
        code = event.exit_code
    except CommandExit as error:
        print(f"error: {error}", file=sys.stderr)
        code = error.exit_code
    except OSError as error:
        message = files.describe_disk_error(error)
        if message is None:
            raise
        _exit_at_once(DiskError(message))
    except KeyboardInterrupt:
        code = 130
    sys.exit(code)


def _exit_at_once(error: DiskError) -> NoReturn:
    """Exits without waiting for other threads, which would write to the disk too."""
    print(f"error: {error}", file=sys.stderr)
    sys.stderr.flush()
    os._exit(error.exit_code)


def log_to_stderr() -> None:
    """Shows what this package logs, and the warnings of others, as commands do."""
    absl_flags.FLAGS.mark_as_parsed()  # or absl's first line says that they are not
    logging.use_absl_handler()
    logging.set_verbosity(logging.INFO)
    logging.get_absl_handler().setFormatter(std_logging.Formatter("%(message)s"))
    logging.get_absl_logger().addFilter(_ours_or_serious)  # for log.txt too
    logging.get_absl_handler().addFilter(_ours_or_serious)  # JAX has its own loggers
    # or transformers, of which tokenizers alone are used, says that it has no PyTorch
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    sys.unraisablehook = _print_unraisable


def _print_unraisable(event) -> None:
    # TensorStore reports this of a failed write, besides raising the error itself.
    if str(event.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(event)


def _ours_or_serious(record: std_logging.LogRecord) -> bool:
    # Orbax logs twenty lines a checkpoint through the same logger.
    if pathlib.Path(record.pathname).is_relative_to(_PACKAGE):
        return True
    harmless = "Skipping merge of OCDBT" in str(record.msg)  # nobody asks for a merge
    # An error that a thread of Orbax logs with a traceback is raised in the main one.
    harmless |= bool(record.exc_info)
    return record.levelno >= std_logging.WARNING and not harmless
