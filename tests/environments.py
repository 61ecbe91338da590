# SPDX-License-Identifier: Apache-2.0
"""Runs tests in a new environment with a named set of versions.

    python tests/environments.py oldest                    the set's own tests
    python tests/environments.py newest -- tests/data -x   others, with pytest's flags

Sets:
    oldest          the oldest versions that pyproject.toml allows
    newest          the newest ones
    oldest-torch    the oldest diffusers, transformers and peft that exports load in
    flax-reference  the last diffusers with Flax classes, the models' reference

Exit codes: pytest's; 2 if the environment cannot be installed.
"""

import argparse
import dataclasses
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import tomllib

ROOT = pathlib.Path(__file__).resolve().parents[1]
TOOLS = ("pytest", "pytest-xdist", "hypothesis", "kubernetes-validate", "setuptools")


@dataclasses.dataclass(frozen=True)
class VersionSet:
    """How a set is resolved (uv's word), the extra it adds, and its tests."""

    resolution: str
    extra: str
    tests: tuple[str, ...]


QUICK = ("tests/data", "tests/sampling", "tests/training", "tests/report/test_page.py")
SETS = {
    "oldest": VersionSet("lowest-direct", "", QUICK),
    "newest": VersionSet("highest", "", QUICK),
    "oldest-torch": VersionSet("lowest-direct", "torch", ("tests/test_convert.py",)),
    "flax-reference": VersionSet(
        "highest", "flax-reference", ("tests/models/sd/flax_reference.py",)
    ),
}


def requirements(extra: str) -> list[str]:
    """Returns the lines of a plain install and of an extra."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    return project["dependencies"] + (
        project["optional-dependencies"][extra] if extra else []
    )


def install(chosen: VersionSet, venv: pathlib.Path, index: str) -> None:
    """Makes the environment; raises CalledProcessError."""
    python = str(venv / "bin" / "python")
    uv = shutil.which("uv") or str(venv / "bin" / "uv")
    call(sys.executable, "-m", "venv", str(venv))
    if not os.path.exists(uv):
        call(python, "-m", "pip", "install", "-q", "uv")
    pip = [uv, "pip", "install", "-q", "--python", python]
    pip += ["--index-strategy", "unsafe-best-match"]
    pip += ["--extra-index-url", index] if index else []
    lines = requirements(chosen.extra)
    # The oldest that have a wheel for this Python: building one takes compilers.
    names = [re.split(r"[\[<>=]", line)[0] for line in lines]
    wheels = [f"--only-binary={name}" for name in names]
    call(*pip, *wheels, f"--resolution={chosen.resolution}", *lines)
    call(*pip, *TOOLS)


def call(*command: str) -> None:
    print("$", shlex.join(command), flush=True)
    subprocess.run(command, check=True)


def main() -> int:
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument("set", choices=SETS)
    flags.add_argument("--into", metavar="DIR", help="keep the environment there")
    flags.add_argument("--index", default="", metavar="URL", help="a further index")
    flags.epilog = "What follows -- is given to pytest, instead of the set's own tests."
    argv = sys.argv[1:]
    end = argv.index("--") if "--" in argv else len(argv)
    args = flags.parse_args(argv[:end])
    chosen = SETS[args.set]
    with tempfile.TemporaryDirectory(prefix="gift-jax-") as temporary:
        venv = pathlib.Path(args.into or temporary, args.set).resolve()
        python = str(venv / "bin" / "python")
        try:
            if not venv.exists():
                install(chosen, venv, args.index)
        except subprocess.CalledProcessError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        cache = ["-o", f"cache_dir={venv}/pytest-cache"]
        tests = argv[end + 1 :] or chosen.tests
        command = [python, "-m", "pytest", "-q", *cache, *tests]
        print("$", shlex.join(command), flush=True)
        env = os.environ | {"PYTHONPATH": str(ROOT)}
        return subprocess.run(command, cwd=ROOT, env=env).returncode


if __name__ == "__main__":
    sys.exit(main())
