# SPDX-License-Identifier: Apache-2.0
"""Immunize text-to-image diffusion models against malicious fine-tuning.

Usage: gift-jax COMMAND ..., or python -m gift_jax.COMMAND ...
"""

import difflib
import runpy
import sys

COMMANDS = {
    "train": "immunize a model",
    "attack": "fine-tune a model as an attacker, or an honest user, would",
    "generate": "draw images with a model",
    "evaluate": "measure what a model draws, or images drawn elsewhere",
    "benchmark": "try every defense against every attack",
    "report": "turn benchmark folders into one HTML page",
    "convert": "convert model folders and checkpoints; merge LoRA; verify in PyTorch",
    "compile": "compile a training step for TPUs on a machine without any",
    "doctor": "say what is installed, what fits, and what is wrong",
    "pretrain": "make the embedded model from the embedded images",
    "demo": "immunize, attack and judge the embedded model in minutes",
}


def usage() -> str:
    lines = [f"    {name:<10} {line}" for name, line in COMMANDS.items()]
    return f"{__doc__}\nCommands, each with its own --help:\n\n" + "\n".join(lines)


def main() -> int:
    """Runs the command that the first argument names; returns the exit code."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        print(usage())
        return 0
    if name == "--version":
        from gift_jax import __version__

        print(f"gift_jax {__version__}")
        return 0
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {close[0]}?" if close else "see gift-jax --help"
        print(f"error: gift-jax has no command {name!r:.60}; {hint}", file=sys.stderr)
        return 2
    sys.argv = [f"gift-jax {name}", *sys.argv[2:]]
    runpy.run_module(f"gift_jax.{name}", run_name="__main__", alter_sys=True)
    return 0  # not reached: commands exit by themselves


if __name__ == "__main__":
    sys.exit(main())
