# SPDX-License-Identifier: Apache-2.0
"""Nothing that is read may run: no pickles, no eval, no code from the hub."""

import ast
import pathlib

import pytest

import gift_jax

ROOT = pathlib.Path(gift_jax.__file__).parent
PICKLES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
PICKLES |= {"torch"}  # whose load runs what is in a file, and which is for tests alone
RUNS = {"eval", "exec", "compile", "__import__"}
UNSAFE = {"allow_pickle": True, "trust_remote_code": True, "weights_only": False}
FILES = sorted(ROOT.rglob("*.py"))


def offences(source):
    """Returns what a Python file's text does that a file from a stranger could use."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [getattr(node, "module", None) or ""]
            names += [alias.name for alias in node.names]
            found += [name for name in names if name.split(".")[0] in PICKLES]
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            found += [node.func.id] if node.func.id in RUNS else []
        if isinstance(node, ast.keyword) and node.arg in UNSAFE:
            value = getattr(node.value, "value", "not a constant")
            found += [node.arg] if value in (UNSAFE[node.arg], "not a constant") else []
    return found


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from torch import load",
        "import torch.nn",
        "eval(text)",
        "exec(text)",
        "np.load(file, allow_pickle=True)",
        "np.load(file, allow_pickle=flag)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
    ],
)
def test_the_search_finds_them(line):
    assert offences(line)
    assert not offences(
        "np.load(file, allow_pickle=False); model.eval(); re.compile(a)"
    )


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_no_file_of_the_package_runs_what_it_reads(file):
    assert len(FILES) > 50
    assert offences(file.read_text(encoding="utf-8")) == []
