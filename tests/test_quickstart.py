# SPDX-License-Identifier: Apache-2.0
"""The notebook calls public functions as they are; if slow, it runs, cut short."""

import ast
import json
import pathlib
import subprocess
import sys

import pytest

from gift_jax.runtime import cli

# of a ConfigDict
UNCHECKED = "# pyright: reportAttributeAccessIssue=false"
UNCHECKED += "\n# pyright: reportOptionalMemberAccess=false"
PATH = pathlib.Path(__file__).resolve().parents[1] / "examples" / "quickstart.ipynb"


def code_cells():
    notebook = json.loads(PATH.read_text(encoding="utf-8"))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(not cell["outputs"] for cell in cells), "clear the outputs"
    return ["".join(cell["source"]) for cell in cells]


@pytest.mark.slow
def test_quickstart_runs_in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "log_to_stderr", lambda: None)  # for later tests, too
    names = {}
    for source in code_cells():
        cell = ast.parse(source.replace("SHORT = False", "SHORT = True"))
        # what a cell ends with is for the reader's screen
        cell.body = [line for line in cell.body if not isinstance(line, ast.Expr)]
        exec(compile(cell, str(PATH), "exec"), names)
    assert names["SHORT"]
    assert set(names["recognized"]) > set(names["models"])
    # a row for each model: it draws something, and not the same as the others
    drawn = {name: images.tobytes() for name, images in names["images"].items()}
    assert len(drawn) == 7 and len(set(drawn.values())) == 7
    assert (tmp_path / "runs" / "quickstart" / "grid.png").is_file()


def test_quickstart_calls_what_there_is(tmp_path):
    def errors(code):
        file = tmp_path / "quickstart.py"
        file.write_text(f"# pyright: basic\n{UNCHECKED}\n{code}")
        command = [sys.executable, "-m", "pyright", "--pythonpath", sys.executable]
        done = subprocess.run([*command, file], capture_output=True, text=True)
        assert "informations" in done.stdout, done.stderr
        return [line for line in done.stdout.splitlines() if " error: " in line]

    code = "\n".join(code_cells())
    assert not errors(code)
    old = code.replace("load_model(str(folder))", "load_model(str(folder), size=3)")
    assert len(errors(old)) == 1


def test_quickstart_uses_public_names_only():
    used, imported = set(), set()
    for node in ast.walk(ast.parse("\n".join(code_cells()))):
        if isinstance(node, ast.Attribute):
            used.add(node.attr)
        if isinstance(node, ast.ImportFrom | ast.Import):
            imported |= {alias.name for alias in node.names}
    assert {"run", "draw_images", "load_model"} <= used | imported
    assert not [name for name in used | imported if name.startswith("_")]
