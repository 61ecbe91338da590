# SPDX-License-Identifier: Apache-2.0
"""The wheel works without the clone: commands, configs, the embedded model."""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import zipfile

import pytest

from gift_jax import __main__ as console
from gift_jax.runtime import config
from gift_jax.runtime.errors import UserError

ROOT = pathlib.Path(__file__).resolve().parents[1]
SOURCES = ("gift_jax", "configs", "pyproject.toml", "setup.py", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel of a copy of the sources: a build leaves folders where it runs."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, source / name, ignore=ignored)
        else:
            shutil.copy(ROOT / name, source)
    flags = ["--quiet", "--no-build-isolation", "--no-deps", "--wheel-dir", folder]
    pip("wheel", *flags, source)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """A folder with the installed wheel, and the environment that finds it there."""
    folder = tmp_path_factory.mktemp("installed")
    pip("install", "--quiet", "--no-deps", "--no-compile", "--target", folder, wheel)
    return folder, os.environ | {"PYTHONPATH": str(folder)}


def pip(*args):
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *args]
    subprocess.run(command, check=True)  # pip's own output says what is wrong


def test_wheel_has_assets_configs_and_types(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    configs = {f"gift_jax/configs/{p.name}" for p in (ROOT / "configs").glob("*.py")}
    assets = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "gift_jax" / "assets").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert len(configs) >= 6 and len(assets) >= 15
    assert configs | assets | {"gift_jax/py.typed"} <= names
    assert not [name for name in names if name.startswith(("tests/", "configs/"))]


@pytest.mark.slow
def test_installed_command_trains_in_an_empty_folder(installed, tmp_path):
    folder, env = installed
    argv = ["train", "--config", "configs/emoji_gift.py:smoke", "--workdir", "run"]
    argv += ["--config.samples.num=0", "--config.steps=0", "--config.verify=off"]
    run = subprocess.run(
        [sys.executable, folder / "bin" / "gift-jax", *argv],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "run" / "export" / "model_index.json").is_file()
    assert json.loads((tmp_path / "run" / "config.json").read_text())
    where = [sys.executable, "-c", "import gift_jax; print(gift_jax.__file__)"]
    path = subprocess.check_output(where, cwd=tmp_path, env=env, text=True)
    assert pathlib.Path(path).is_relative_to(folder)


def test_console_help_lists_the_commands_that_exist(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gift-jax", "--help"])
    assert console.main() == 0
    text = capsys.readouterr().out
    package = ROOT / "gift_jax"
    commands = {p.stem for p in package.glob("*.py") if "run_main" in p.read_text()}
    commands |= {path.parent.name for path in package.glob("*/__main__.py")}
    assert {"train", "report"} <= commands == set(console.COMMANDS)
    assert all(f"    {name} " in text for name in commands)


def test_console_names_an_unknown_command(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gift-jax", "trian"])
    assert console.main() == 2
    assert capsys.readouterr().err.endswith("did you mean train?\n")


def test_find_config_prefers_the_folder_it_runs_in(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    packaged = config.find_config("configs/emoji_gift.py")
    assert packaged == ROOT / "configs" / "emoji_gift.py"
    (tmp_path / "configs").mkdir()
    local = tmp_path / "configs" / "emoji_gift.py"
    local.write_text("")
    assert config.find_config("configs/emoji_gift.py").resolve() == local
    with pytest.raises(UserError, match="is no file"):
        config.find_config("other/emoji_gift.py")
