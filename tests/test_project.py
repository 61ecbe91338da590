# SPDX-License-Identifier: Apache-2.0
"""What packaging promises: versions agree, assets ship, every file says its licence."""

import pathlib
import re
import tomllib

import pytest

import gift_jax

ROOT = pathlib.Path(__file__).resolve().parents[1]
PYTHON_FILES = sorted(
    path
    for folder in ("gift_jax", "configs", "tests", "perf", "launch")
    for path in (ROOT / folder).rglob("*.py")
)


@pytest.fixture(scope="module")
def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_project_has_python_files():
    assert ROOT / "gift_jax" / "__init__.py" in PYTHON_FILES


@pytest.mark.parametrize(
    "path", PYTHON_FILES, ids=lambda path: str(path.relative_to(ROOT))
)
def test_python_file_names_its_licence_first(path):
    first = path.read_text(encoding="utf-8").split("\n", 1)[0]
    assert first == "# SPDX-License-Identifier: Apache-2.0"


def test_changelog_has_the_current_version():
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(rf"^## {re.escape(gift_jax.__version__)}\b", text, re.M)


def test_makefile_wants_the_torch_of_the_test_extra(project):
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    wanted = re.search(r"^TORCH := (.+)$", makefile, re.M).group(1)
    assert wanted in project["project"]["optional-dependencies"]["test"]


def test_torch_is_in_the_test_extra_only(project):
    extras = project["project"]["optional-dependencies"]
    others = project["project"]["dependencies"]
    others = sum((extras[name] for name in ("tpu", "cuda12", "cuda13")), others)
    assert not [line for line in others if re.match(r"(torch|tensorflow)\b(?!-)", line)]


def test_license_is_whole_and_artwork_licences_lie_beside_the_artwork():
    license_text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Version 2.0, January 2004" in license_text
    assert "END OF TERMS AND CONDITIONS" in license_text
    artwork = ROOT / "gift_jax" / "assets" / "emoji64" / "LICENSES.md"
    for name in ("CC BY 4.0", "CC BY-SA 4.0", "MIT", "Apache 2.0"):
        assert name in artwork.read_text(encoding="utf-8")


def test_package_data_covers_the_assets(project):
    patterns = project["tool"]["setuptools"]["package-data"]["gift_jax"]
    package = ROOT / "gift_jax"
    shipped = {path for pattern in patterns for path in package.glob(pattern)}
    for name in ("emoji64.npz", "metadata.csv", "known.txt", "LICENSES.md"):
        assert package / "assets" / "emoji64" / name in shipped
