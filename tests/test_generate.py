# SPDX-License-Identifier: Apache-2.0
"""The generate command line: what it writes, and its mistakes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import gift_jax
from gift_jax import generate
from gift_jax.runtime.errors import UserError


def run(folder, out, *flags, prompts=("a dog", "a cat")):
    flags = [f"--model={folder}", f"--out={out}", "--steps=2", *flags]
    for prompt in prompts:
        flags += ["--prompt", prompt]
    assert generate.main(flags) == 0
    return {p.name: pixels(p) for p in sorted(out.glob("0*.png"))}


def pixels(file):
    with Image.open(file) as image:
        return np.asarray(image)


def test_generate_writes_pictures_grid_and_settings(tiny_folder, tmp_path):
    pictures = run(tiny_folder, tmp_path, "--num=3", "--batch-size=2", "--seed=7")
    assert list(pictures) == [f"00{p}-00{n}.png" for p in range(2) for n in range(3)]
    assert pictures["000-000.png"].shape == (16, 16, 3)
    assert (pictures["000-000.png"] != pictures["000-001.png"]).any()
    assert (pictures["000-000.png"] != pictures["001-000.png"]).any()
    assert pixels(tmp_path / "grid.png").shape[1] > 3 * 96
    settings = json.loads((tmp_path / "generate.json").read_text())
    assert settings["prompt"] == ["a dog", "a cat"]
    assert (settings["seed"], settings["scheduler"]) == (7, "ddim")
    assert len(settings["model_sha256"]) == 64


def test_a_picture_depends_on_its_seed_and_number_only(tiny_folder, tmp_path):
    few = run(tiny_folder, tmp_path / "a", "--num=2", "--batch-size=2")
    more = run(tiny_folder, tmp_path / "b", "--num=3", "--batch-size=1", "--no-grid")
    assert not (tmp_path / "b" / "grid.png").exists()
    for name, picture in few.items():  # sizes of batch round differently
        assert np.abs(picture.astype(int) - more[name].astype(int)).max() <= 1
    other = run(tiny_folder, tmp_path / "c", "--num=2", "--batch-size=2", "--seed=1")
    assert (other["000-000.png"] != few["000-000.png"]).any()
    steered = run(
        tiny_folder, tmp_path / "d", "--num=2", "--batch-size=2", "--negative-prompt=x"
    )
    assert (steered["000-000.png"] != few["000-000.png"]).any()


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--num=0"], "--num=0 must be at least 1"),
        (["--steps=-3"], "--steps=-3 must be at least 1"),
        (["--batch-size=0"], "--batch-size=0 must be at least 1"),
        (["--seed=-1"], "--seed=-1 must be from 0 to"),
        (["--guidance=0"], "guidance=0.0 must be at least 1"),
        (["--scheduler=eular"], "choose from"),
        (["--scheduler=lcm", "--steps=60"], "steps=60 must be at most original_inf"),
        (["--model=nowhere"], "model='nowhere': no such folder"),
        (["--nmu=3"], "unrecognized arguments: --nmu=3"),
        (["--num=many"], "invalid int value: 'many'"),
    ],
)
def test_mistakes_are_user_errors(tiny_folder, tmp_path, flags, message):
    base = ["--prompt=a", f"--out={tmp_path / 'out'}", f"--model={tiny_folder}"]
    with pytest.raises(UserError, match=message) as caught:
        generate.main(base + flags)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_prompt_and_a_folder_to_write_to_are_required(tiny_folder, tmp_path):
    with pytest.raises(UserError, match="required: --prompt"):
        generate.main([f"--out={tmp_path}"])
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(UserError, match="is a file; must be a folder"):
        generate.main(["--prompt=a", f"--out={file}", f"--model={tiny_folder}"])


def test_command_line_ends_with_one_line_and_exit_code_2(tmp_path):
    command = [sys.executable, "-m", "gift_jax.generate", "--prompt=a", "--out=out"]
    root = str(Path(gift_jax.__file__).parents[1])
    done = subprocess.run(
        [*command, "--model=nowhere"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": root},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "model='nowhere'" in done.stderr
