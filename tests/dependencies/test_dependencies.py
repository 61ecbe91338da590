# SPDX-License-Identifier: Apache-2.0
"""What is imported is asked for and explained; the verdicts and exit codes."""

import ast
import importlib.metadata
import runpy
import subprocess
import sys

import licences
import pytest
import version_sets
import vulnerabilities
from distributions import ROOT, canonical, closure, plain, requirements, split

COMMAND = [sys.executable, ROOT / "tests" / "dependencies"]
DIRECT = {canonical(split(line)[0]) for line in requirements()}
EXTRAS = ("nudity", "cuda12", "cuda13", "tpu", "test")


def imported():
    """Returns {top-level module: one file} of what gift_jax imports from elsewhere."""
    found = {}
    for path in sorted((ROOT / "gift_jax").rglob("*.py")):
        if "assets" in path.parts:  # how the pictures were made; never imported
            continue
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module]
            else:
                continue
            for name in names:
                found.setdefault(name.partition(".")[0], path)
    for name in {*sys.stdlib_module_names, "gift_jax"} & set(found):
        del found[name]
    return found


def providers():
    """Returns {top-level module: distributions that have it}."""
    return {
        module: {canonical(name) for name in names}
        for module, names in importlib.metadata.packages_distributions().items()
    }


def test_every_direct_dependency_is_imported_or_says_why_not():
    have = providers()
    used = set().union(*(have.get(module, set()) for module in imported()))
    assert "jax" in used
    excused = {canonical(name) for name in licences.NOT_IMPORTED}
    assert DIRECT - used == excused


def test_everything_imported_is_a_direct_dependency():
    optional = {canonical(split(line)[0]) for line in requirements("nudity")}
    allowed, have, strange = DIRECT | optional, providers(), {}
    for module, path in imported().items():
        if not have.get(module, {module}) & allowed:
            strange[module] = str(path.relative_to(ROOT))
    assert not strange


def test_nothing_optional_is_imported_with_a_module():
    optional = {split(line)[0] for line in requirements("nudity")}
    for path in (ROOT / "gift_jax").rglob("*.py"):
        for node in ast.parse(path.read_text("utf-8")).body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = {alias.name for alias in node.names}
                names.add(getattr(node, "module", None))
                assert not names & optional, path


def test_document_names_every_direct_dependency_with_its_range():
    text = (ROOT / "docs" / "dependencies.md").read_text("utf-8")
    for line in requirements():
        name, wanted = split(line)
        assert f"| {name} | {wanted} | " in text, "run the command's inventory"
    for extra in EXTRAS:
        assert f"### gift-jax[{extra}]" in text


def test_every_direct_dependency_has_a_lower_bound_and_a_reason():
    for line in {*requirements(), *requirements("test")}:
        name, wanted = split(line)
        assert wanted.startswith((">=", "==")), line
        assert licences.NEEDED[name]


def test_licences_here_are_permissive_or_explained():
    assert not licences.unexplained({*plain(), *closure(requirements("test"))})


def test_plain_install_holds_what_its_parts_want_and_nothing_of_the_extras():
    wanted = plain()
    assert "jax" in wanted["jaxlib"] and "tensorflow-datasets" in wanted["promise"]
    assert not {"torch", "nudenet", "pytest", "ruff"} & set(wanted)


@pytest.mark.parametrize(
    "said, expected",
    [
        ("MIT", True),
        ("Apache-2.0 AND BSD-2-Clause", True),
        ("MIT OR GPL-3.0-only", True),
        ("MPL-2.0 AND MIT", False),
        ("MIT; a licence file in it: GNU Affero General Public License", False),
        ("GNU General Public License v3 (GPLv3)", False),
        ("MIT License, GNU Lesser General Public License v3 (LGPLv3)", False),
        ("not said", False),
    ],
)
def test_permissive_reads_expressions(said, expected):
    assert licences.permissive(said) is expected


@pytest.mark.parametrize(
    "metadata, file, expected",
    [
        ("License-Expression: ISC\nLicense: MIT", "ISC License", "ISC"),
        ("License: BSD\n", "Copyright", "BSD"),
        ("Classifier: License :: OSI Approved :: MIT License", "x", "MIT License"),
        ("License: " + "A licence. " * 9, "x", "A licence. A licence. A licence"),
        ("Summary: x", "x", "not said"),
        (
            "License: MIT",
            "   GNU AFFERO GENERAL PUBLIC LICENSE\n",
            "MIT; a licence file in it: GNU Affero General Public License",
        ),
    ],
)
def test_licence_is_read_from_metadata_and_checked(tmp_path, metadata, file, expected):
    folder = tmp_path / "odd-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Name: odd\nVersion: 1.0\n{metadata}\n")
    (folder / "LICENSE").write_text(file)
    (folder / "RECORD").write_text("odd-1.0.dist-info/LICENSE,,\n")
    dist = importlib.metadata.PathDistribution(folder)
    assert licences.licence(dist).startswith(expected)


FINDING = {"id": "PYSEC-1", "aliases": ["CVE-1"], "fix_versions": ["13.1"]}
CLEAN = {"name": "jax", "version": "0.10", "vulns": []}
BAD = {"name": "Pillow", "version": "13.0", "vulns": [FINDING]}
SKIPPED = {"name": "rich", "skip_reason": "Dependency not found"}


@pytest.mark.parametrize(
    "report, known, code, said",
    [
        ([CLEAN], {}, 0, "1 distributions audited, 0 findings not explained"),
        ([CLEAN, BAD], {}, 1, "PYSEC-1 CVE-1; fixed in 13.1; NOT EXPLAINED"),
        ([BAD], {("pillow", "CVE-1"): "not read"}, 0, "explained: not read"),
        ([BAD], {("jax", "CVE-1"): "not read"}, 1, "NOT EXPLAINED"),
        ([CLEAN], {("jax", "CVE-2"): "old"}, 0, "jax: CVE-2 is not found any more"),
        ([SKIPPED], {}, 69, "pypi knows nothing of 1 of 1 distributions (rich)"),
        ([CLEAN, SKIPPED], {}, 69, "nothing of 1 of 2"),
        ([BAD, SKIPPED], {}, 1, "NOT EXPLAINED"),
        ([], {}, 69, "nothing of 0 of 0"),
    ],
)
def test_audit_judges(report, known, code, said, capsys):
    assert vulnerabilities.judge(report, known, "pypi") == code
    assert said in capsys.readouterr().out


def audited(tmp_path, body, known=""):
    """Returns (code, stdout, stderr) of an audit by a stand-in for pip-audit."""
    program, listed = tmp_path / "pip-audit", tmp_path / "known.toml"
    program.write_text(f"#!{sys.executable}\nimport json, sys\n{body}\n")
    program.chmod(0o755)
    listed.write_text(known)
    flags = ["audit", "--pip-audit", program, "--known", listed]
    done = subprocess.run([*COMMAND, *flags], capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


def test_audit_asks_about_every_pinned_distribution_of_a_plain_install(tmp_path):
    body = (
        "pins = open(sys.argv[sys.argv.index('-r') + 1]).read().split()\n"
        "told = [dict(zip(('name', 'version'), pin.split('=='))) for pin in pins]\n"
        "print(json.dumps({'dependencies': told}))"
    )
    code, out, _ = audited(tmp_path, body)
    assert code == 0 and out.startswith(f"{len(plain())} distributions audited, 0")


def test_audit_that_gets_no_answer_says_so_in_one_line(tmp_path):
    code, out, err = audited(tmp_path, "sys.exit('trace\\nConnectionError: no route')")
    assert code == 69 and not err
    said = "not audited: pip-audit got no answer from pypi: ConnectionError: no route\n"
    assert out == said


def test_audit_refuses_a_finding_explained_without_a_reason(tmp_path):
    entry = '[[known]]\nid = "CVE-1"\npackage = "jax"\nwhy = ""\n'
    code, _, err = audited(tmp_path, "", entry)
    assert code == 2 and "must say id, package and why" in err


def test_shipped_list_of_known_vulnerabilities_is_read():
    assert isinstance(vulnerabilities.read_known(vulnerabilities.KNOWN), dict)


def planned(*flags):
    """Returns the lines that sets would run."""
    done = subprocess.run(
        [*COMMAND, "sets", "--dry-run", *flags], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_sets_ask_for_the_oldest_and_the_newest_without_pytorch():
    lines = planned("--python", "3.12")
    resolved = [line for line in lines if "--resolution" in line]
    assert len(resolved) == 2
    assert "/oldest/" in resolved[0] and "--resolution=lowest-direct" in resolved[0]
    assert "/newest/" in resolved[1] and "--resolution=highest" in resolved[1]
    assert sum("venv --quiet --python 3.12" in line for line in lines) == 2
    assert not [line for line in lines if "torch" in line or "nudenet" in line]
    tests = [line for line in lines if "-m pytest" in line]
    assert all("tests/test_loop.py" in line and "tests/data" in line for line in tests)


def test_sets_with_pytorch_one_set_and_tests_of_choice():
    lines = planned("--only=newest", "--torch", "--torch-index=a:b", "--", "-k", "x y")
    assert not [line for line in lines if "oldest" in line]
    assert [line for line in lines if "-m pip install --quiet --index-url=a:b" in line]
    assert lines[-1].endswith("-k 'x y'") and "tests/" not in lines[-1]


def test_quick_tests_exist():
    assert all((ROOT / path).exists() for path in version_sets.QUICK)


def test_sets_leave_an_environment_that_is_there_alone(tmp_path):
    (tmp_path / "newest").mkdir()
    done = subprocess.run(
        [*COMMAND, "sets", "--into", tmp_path], capture_output=True, text=True
    )
    assert done.returncode == 2 and "newest is there already" in done.stderr


@pytest.mark.parametrize(
    "resolves, passes, code, said",
    [
        (True, True, 0, "oldest  3.x     1.0  3 passed in 1s"),
        (True, False, 1, "oldest  3.x     1.0  1 failed in 1s"),
        (False, True, 1, "oldest  -       -    cannot be installed"),
    ],
)
def test_sets_report_what_each_did(
    tmp_path, monkeypatch, capsys, resolves, passes, code, said
):
    """With a stand-in for uv, whose environments hold a stand-in for Python."""
    python = f"""#!{sys.executable}
import json, sys
if "importlib.metadata" in sys.argv[2]:
    print(json.dumps(["3.x", *["1.0"] * (len(sys.argv) - 3)]))
elif sys.argv[2] == "pytest":
    print("== 3 passed in 1s ==" if {passes} else "== 1 failed in 1s ==")
    sys.exit(not {passes})
"""
    uv = f"""#!{sys.executable}
import pathlib, sys
if sys.argv[1] == "venv":
    python = pathlib.Path(sys.argv[-1], "bin", "python")
    python.parent.mkdir(parents=True)
    python.write_text({python!r})
    python.chmod(0o755)
else:
    sys.exit(not {resolves})
"""
    (tmp_path / "uv").write_text(uv)
    (tmp_path / "uv").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(version_sets, "SHOWN", ["jax"])
    command = runpy.run_path(str(COMMAND[1] / "__main__.py"), run_name="command")
    flags = ["sets", "--only=oldest", f"--into={tmp_path / 'sets'}"]
    assert command["main"](flags) == code
    assert capsys.readouterr().out.splitlines()[-1].rstrip() == said


def test_help_of_every_command():
    for name in ("inventory", "audit", "sets"):
        done = subprocess.run(
            [*COMMAND, name, "--help"], capture_output=True, text=True
        )
        assert done.returncode == 0 and f"tests/dependencies {name}" in done.stdout
