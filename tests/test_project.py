# SPDX-License-Identifier: Apache-2.0
"""What the project's files promise together: versions, extras, licenses."""

import pathlib
import re
import tomllib

import pytest

import gift_jax

ROOT = pathlib.Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_changelog_and_citation_have_the_current_version():
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(rf"^## {re.escape(gift_jax.__version__)}\b", text, re.M)
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {gift_jax.__version__}\n" in citation


def test_makefile_installs_the_torch_of_the_test_extra(project):
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    torch = re.search(r"^TORCH := (.+)$", makefile, re.M).group(1)
    assert torch in project["project"]["optional-dependencies"]["test"]


def test_torch_is_in_the_test_extra_only(project):
    extras = project["project"]["optional-dependencies"]
    others = project["project"]["dependencies"]
    others = sum((extras[name] for name in ("tpu", "cuda12", "cuda13")), others)
    assert not [line for line in others if re.match(r"(torch|tensorflow)\b(?!-)", line)]


def test_license_is_whole_and_artwork_licenses_lie_beside_the_artwork():
    license_text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Version 2.0, January 2004" in license_text
    assert "END OF TERMS AND CONDITIONS" in license_text
    artwork = ROOT / "gift_jax" / "assets" / "emoji64" / "LICENSES.md"
    for name in ("CC BY 4.0", "CC BY-SA 4.0", "MIT", "Apache 2.0"):
        assert name in artwork.read_text(encoding="utf-8")
