# SPDX-License-Identifier: Apache-2.0
"""Runs tests with the oldest and the newest versions that pyproject.toml allows."""

import json
import os
import pathlib
import shlex
import shutil
import subprocess
import sys
import tempfile

from distributions import ROOT, fail, requirements, split

SETS = {"oldest": "lowest-direct", "newest": "highest"}
SHOWN = "jax flax optax orbax-checkpoint diffusers transformers numpy".split()
QUICK = [  # between them they touch every direct dependency, and none needs PyTorch
    "tests/data",
    "tests/metrics/test_gaps.py",
    "tests/metrics/test_quality.py",
    "tests/models/test_kernels.py",
    "tests/models/test_tensors.py",
    "tests/report/test_page.py",
    "tests/test_checkpoint.py",
    "tests/test_config.py",
    "tests/test_generate.py",
    "tests/test_launch.py",
    "tests/test_loop.py",
    "tests/test_losses.py",
    "tests/test_sharding.py",
]
_WHOLE = {"torch", "peft", "nudenet"}  # of the test extra: with --torch only
_UNUSED = {"ruff"}
_IMPORTS = "import gift_jax.train, gift_jax.attack, gift_jax.evaluate, gift_jax.report"
_VERSIONS = """import json, platform, sys
from importlib.metadata import version
print(json.dumps([platform.python_version(), *map(version, sys.argv[1:])]))
"""


def installing(name: str, args, uv: str, venv: pathlib.Path) -> list[list[str]]:
    """Returns the commands that make one set's environment."""
    python = str(venv / "bin" / "python")
    pip = [uv, "pip", "install", "--quiet", "--python", python]
    tools = {split(line)[0]: line for line in requirements("test")}
    chosen = set(tools) - _UNUSED - (set() if args.torch else _WHOLE)
    # The oldest version that has a wheel for this Python: building takes compilers.
    wheels = [f"--only-binary={split(line)[0]}" for line in requirements()]
    seed = ["--seed"] if args.torch else []
    commands = [
        [uv, "venv", "--quiet", *seed, "--python", args.python, str(venv)],
        [
            *pip,
            f"--resolution={SETS[name]}",
            *wheels,
            "-r",
            str(ROOT / "pyproject.toml"),
        ],
    ]
    if args.torch:  # by pip, as in the Makefile: its settings may name the CPU build
        index = [f"--index-url={args.torch_index}"] if args.torch_index else []
        commands.append(
            [python, "-m", "pip", "install", "--quiet", *index, tools["torch"]]
        )
    return [*commands, [*pip, *(tools[tool] for tool in sorted(chosen))]]


def testing(args, venv: pathlib.Path) -> list[list[str]]:
    """Returns the commands that try a set, to be run where gift_jax is found."""
    python = str(venv / "bin" / "python")
    tests = args.tests or ([] if args.all else QUICK)
    cache = ["-o", f"cache_dir={venv}-cache"]
    return [
        [python, "-c", _IMPORTS],
        [python, "-m", "pytest", "-q", *cache, *tests],
    ]


def run(args) -> int:
    names = [args.only] if args.only else list(SETS)
    with tempfile.TemporaryDirectory(prefix="gift-jax-sets-") as temporary:
        into = pathlib.Path(args.into or temporary).resolve()
        if taken := [str(into / name) for name in names if (into / name).exists()]:
            fail(f"{', '.join(taken)} is there already; remove it or choose another")
        uv = shutil.which("uv") or str(into / "uv" / "bin" / "uv")
        if args.dry_run:
            for venv in (into / name for name in names):
                commands = installing(venv.name, args, uv, venv) + testing(args, venv)
                print(*map(shlex.join, commands), sep="\n")
            return 0
        if not pathlib.Path(uv).exists():
            _call([sys.executable, "-m", "venv", str(into / "uv")])
            _call(
                [uv.removesuffix("uv") + "python", "-m", "pip", "install", "-q", "uv"]
            )
        rows = [_try(name, args, uv, into / name) for name in names]
    print(table([["set", "python", *SHOWN, "tests"], *(row for _, row in rows)]))
    return int(any(code for code, _ in rows))


def _try(name: str, args, uv: str, venv: pathlib.Path) -> tuple[int, list[str]]:
    """Makes one environment and tests in it; returns the exit code and the row."""
    for command in installing(name, args, uv, venv):
        code, _ = _call(command)
        if code:
            return code, [name, *["-"] * (1 + len(SHOWN)), "cannot be installed"]
    asked = [str(venv / "bin" / "python"), "-c", _VERSIONS, *SHOWN]
    versions = json.loads(subprocess.check_output(asked))
    for command in testing(args, venv):
        code, last = _call(command, PYTHONPATH=str(ROOT))
        if code:
            break
    return code, [name, *versions, last or f"exit code {code}"]


def _call(command: list[str], **env) -> tuple[int, str]:
    """Runs a command, its output passed on; returns its exit code and last line."""
    print("$", shlex.join(command), flush=True)
    last = ""
    with subprocess.Popen(
        command, cwd=ROOT, env=os.environ | env, stdout=subprocess.PIPE, text=True
    ) as running:
        for line in running.stdout:
            print(line, end="", flush=True)
            last = line.strip() or last
    return running.returncode, last.strip("= ")


def table(rows: list[list[str]]) -> str:
    """Returns rows in columns as wide as their widest cells."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    )
