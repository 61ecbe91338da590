# SPDX-License-Identifier: Apache-2.0
"""Known vulnerabilities of what a plain install brings, as pip-audit finds them."""

import json
import pathlib
import subprocess
import sys
import tempfile
import tomllib

from distributions import canonical, fail, installed, plain

KNOWN = pathlib.Path(__file__).with_name("known_vulnerabilities.toml")
OUT_OF_REACH = 69  # EX_UNAVAILABLE of sysexits.h


def run(args) -> int:
    known = read_known(pathlib.Path(args.known))
    pins = [f"{name}=={installed(name).version}\n" for name in sorted(plain())]
    with tempfile.TemporaryDirectory() as folder:
        tool = args.pip_audit or _install(pathlib.Path(folder, "venv"))
        if not tool:
            return OUT_OF_REACH
        file = pathlib.Path(folder, "requirements.txt")
        file.write_text("".join(pins))
        command = [tool, "-r", file, "--disable-pip", "--no-deps", "--format=json"]
        command += ["--aliases=on", "--progress-spinner=off", "-s", args.service]
        asked = subprocess.run(command, capture_output=True, text=True)
    try:
        report = json.loads(asked.stdout)["dependencies"]
    except ValueError:
        why = (asked.stderr.strip().splitlines() or ["it said nothing"])[-1]
        print(f"not audited: pip-audit got no answer from {args.service}: {why[:150]}")
        return OUT_OF_REACH
    return judge(report, known, args.service)


def _install(folder: pathlib.Path) -> pathlib.Path | None:
    """Returns the pip-audit of a new environment, or None after saying why not."""
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    pip = [folder / "bin" / "python", "-m", "pip", "install", "-q", "pip-audit"]
    done = subprocess.run(pip, capture_output=True, text=True)
    if done.returncode:
        why = (done.stderr.strip().splitlines() or ["pip failed"])[-1]
        print(f"not audited: pip-audit cannot be installed: {why[:150]}")
        return None
    return folder / "bin" / "pip-audit"


def read_known(path: pathlib.Path) -> dict[tuple[str, str], str]:
    """Returns {(package, id): why} of the findings that are explained."""
    entries = tomllib.loads(path.read_text("utf-8")).get("known", [])
    for entry in entries:
        if set(entry) != {"id", "package", "why"} or not all(entry.values()):
            fail(f"{path}: each entry must say id, package and why, not {entry}")
    return {(canonical(e["package"]), e["id"]): e["why"] for e in entries}


def judge(report: list[dict], known: dict, service: str) -> int:
    """Prints what was found; returns 0, 1 if any is new, 69 if not all was seen."""
    found, new = set(), 0
    for dist in report:
        for finding in dist.get("vulns", ()):
            ids = [finding["id"], *finding.get("aliases", ())]
            keys = {(canonical(dist["name"]), one) for one in ids}
            found |= keys
            why = next((known[key] for key in sorted(keys) if key in known), None)
            new += why is None
            fixed = " or ".join(finding.get("fix_versions", ())) or "no version"
            verdict = f"explained: {why}" if why else "NOT EXPLAINED"
            print(f"{dist['name']} {dist['version']}: {' '.join(ids)}", end="; ")
            print(f"fixed in {fixed}; {verdict}")
    unknown = [dist["name"] for dist in report if dist.get("skip_reason")]
    if unknown or not report:
        them = ", ".join(unknown[:3]) + (" ..." if len(unknown) > 3 else "")
        print(
            f"not audited: {service} knows nothing of {len(unknown)} of {len(report)} "
            f"distributions ({them}); if that is all of them it is out of reach"
        )
        return 1 if new else OUT_OF_REACH
    for name, one in sorted(set(known) - found):
        print(f"{name}: {one} is not found any more; take it off the list")
    print(f"{len(report)} distributions audited, {new} findings not explained")
    return 1 if new else 0
