# SPDX-License-Identifier: Apache-2.0
"""What gift_jax depends on: licences, vulnerabilities, oldest and newest versions.

    python tests/dependencies inventory  # write docs/dependencies.md
    python tests/dependencies audit      # known vulnerabilities of a plain install
    python tests/dependencies sets       # tests on the oldest and the newest versions

Each has --help. Exit codes: 0 all is well; 1 something was found, or has failed; 2 a
mistake in flags or input; 69 the service that knows vulnerabilities is out of reach.
The first two look at the environment that they run in, which needs gift_jax installed.
"""

import argparse
import sys

import licences
import version_sets
import vulnerabilities
from distributions import ROOT


def parse(argv: list[str] | None) -> argparse.Namespace:
    flags = argparse.ArgumentParser(
        prog="tests/dependencies",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = flags.add_subparsers(required=True)
    what = "write which distributions there are, their licences and what they are for"
    one = commands.add_parser("inventory", description=what, help=what)
    one.set_defaults(run=licences.run)
    one.add_argument("--out", default=ROOT / "docs" / "dependencies.md", metavar="FILE")

    what = (
        "ask pip-audit about every distribution of a plain install, as installed here"
    )
    one = commands.add_parser("audit", description=what, help=what)
    one.set_defaults(run=vulnerabilities.run)
    one.add_argument("--service", default="pypi", help="pypi (default), osv or esms")
    one.add_argument(
        "--known",
        default=vulnerabilities.KNOWN,
        metavar="FILE",
        help="the explained findings (default: %(default)s)",
    )
    one.add_argument(
        "--pip-audit",
        metavar="PROGRAM",
        help="use this one; otherwise one is installed in a temporary environment",
    )

    what = "run tests with the oldest and with the newest versions that are allowed"
    one = commands.add_parser("sets", description=what, help=what)
    one.set_defaults(run=version_sets.run)
    one.add_argument("--only", choices=version_sets.SETS, help="one set")
    one.add_argument(
        "--python",
        default=sys.executable,
        metavar="PYTHON",
        help="version or path of the interpreter (default: this one)",
    )
    one.add_argument(
        "--into", metavar="DIR", help="make the environments here and keep them"
    )
    one.add_argument("--all", action="store_true", help="all tests that are not slow")
    one.add_argument(
        "--torch",
        action="store_true",
        help="the whole test extra: PyTorch, peft and nudenet too",
    )
    one.add_argument("--torch-index", metavar="URL", help="where pip finds PyTorch")
    one.add_argument("--dry-run", action="store_true", help="print the commands only")
    one.add_argument(
        "tests", nargs="*", help="for pytest, after --, instead of the quick part"
    )
    return flags.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    return args.run(args)


if __name__ == "__main__":
    sys.exit(main())
