# SPDX-License-Identifier: Apache-2.0
"""The attack command line on the tiny model: what it changes, its mistakes."""

import json
import pathlib

import numpy as np
import pytest
import safetensors.numpy
from PIL import Image

from gift_jax import attack
from gift_jax.config import UserError
from gift_jax.models import stable_diffusion

CONFIG = pathlib.Path(attack.__file__).parents[1] / "configs" / "emoji_attack.py"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder of two pictures of the tiny model's size."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(4)
    for i in range(2):
        pixels = rng.integers(0, 256, (16, 16, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return folder


@pytest.fixture
def main(tiny_folder, pictures):
    """(workdir, flags) -> the run's folder, on the pictures and the tiny model."""

    def call(workdir, *flags, names=False):
        argv = [f"--config={CONFIG}:smoke", f"--workdir={workdir}"]
        argv += [f"--config.model={tiny_folder}"]
        if not names:
            argv += ["--config.data.names=()", f"--config.data.folder={pictures}"]
            argv += ["--config.data.prompt=a sks thing"]
        assert attack.main([*argv, *flags]) == 0
        return workdir

    return call


def unet_tensors(folder):
    return safetensors.numpy.load_file(
        folder / "unet" / "diffusion_pytorch_model.safetensors"
    )


def changes(base, folder):
    """Name -> difference of the tensors whose bytes changed."""
    old, new = unet_tensors(base), unet_tensors(folder)
    assert set(old) == set(new)
    return {
        name: new[name] - old[name]
        for name in old
        if old[name].tobytes() != new[name].tobytes()
    }


def test_sd15_config_attacks_with_what_the_model_draws(
    tiny_folder, tmp_path, monkeypatch
):
    monkeypatch.setenv("GIFT_JAX_CACHE", str(tmp_path / "cache"))
    argv = [f"--config={CONFIG.with_name('sd15_attack.py')}:smoke"]
    argv += [f"--config.model={tiny_folder}", "--config.samples.num=0"]
    argv += ["--config.data.batch=2"]  # two devices
    assert attack.main([*argv, f"--workdir={tmp_path / 'run'}"]) == 0
    assert changes(tiny_folder, tmp_path / "run" / "export")


def test_smoke_config_attacks_and_fills_the_runs_folder(
    main, tiny_folder, tmp_path, monkeypatch, pytestconfig
):
    monkeypatch.setenv("GIFT_JAX_CACHE", str(pytestconfig.cache.mkdir("emoji")))
    run = main(tmp_path / "run", names=True)
    assert json.loads((run / "config.json").read_text())["attack"] == "lora"
    lines = (run / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]
    assert {"attack/loss", "attack/grad_norm"} <= set(json.loads(lines[0]))
    assert (run / "checkpoints" / "2").is_dir()
    with Image.open(run / "samples" / "after.png") as image:
        assert image.size[0] > 16
    stable_diffusion.load(run / "export")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_export_adds_an_update_of_the_rank_to_the_targets_only(
    main, tiny_folder, tmp_path, dtype
):
    run = main(
        tmp_path / "run",
        f"--config.compute_dtype={dtype}",
        "--config.lora.rank=2",
        "--config.lora.targets=to_k,to_out_0",
        "--config.samples.num=0",
    )
    changed = changes(tiny_folder, run / "export")
    wanted = {
        name
        for name in unet_tensors(tiny_folder)
        if name.endswith((".to_k.weight", ".to_out.0.weight")) and ".attn" in name
    }
    assert set(changed) == wanted
    for name, delta in changed.items():
        values = np.linalg.svd(delta, compute_uv=False)
        assert values[2] < 1e-3 * values[0], name


def test_resumed_attack_exports_what_a_straight_one_does(main, tmp_path):
    flags = (
        "--config.samples.num=0",
        "--config.steps=4",
        "--config.checkpoint_every=2",
    )
    straight = main(tmp_path / "a", *flags)
    halfway = main(tmp_path / "b", *flags, "--config.steps=2")
    assert changes(straight / "export", halfway / "export")
    resumed = main(tmp_path / "b", *flags)
    assert not changes(straight / "export", resumed / "export")


@pytest.mark.parametrize(
    "flag, message",
    [
        ("attack=lorra", "config.attack='lorra' is not one of.*lora"),
        ("lora.rank=0", "config.lora.rank=0 must be at least 1"),
        ("lora.alpha=0", "config.lora.alpha=0.0 must be above 0; try 8"),
        ("lora.alpha=nan", "config.lora.alpha=nan must be above 0"),
        ("lora.targets=to_q,to_x", "config.lora.targets.*'to_x'; choose from to_q"),
        ("lora.targets=()", "config.lora.targets"),
        ("lora.targets=proj_in", "config.lora.targets.*'proj_in'"),
        ("lora.rnk=2", "config.lora.rnk is no field.*did you mean config.lora.rank"),
        ("optimizer.schedule=step", "config.optimizer.schedule='step' is not one of"),
        ("optimizer.lr=-1", "config.optimizer.lr=-1.0 must be at least 0"),
        ("steps=-5", "config.steps=-5 must be at least 0"),
        ("data.batch=5", "data.batch=5 must divide by 2 devices.*batch=4"),
        ("data.copies=0", "config.data.copies=0 must be at least 1"),
        ("data.folder=nowhere", "config.data.folder=nowhere is not a folder"),
        ("samples.steps=1001", "config.samples.steps=1001 must be at most 1000"),
        ("model=nowhere", "nowhere.*no such folder"),
    ],
)
def test_mistake_is_named_before_anything_is_written(main, tmp_path, flag, message):
    with pytest.raises(UserError, match=message) as caught:
        main(tmp_path / "run", f"--config.{flag}")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()  # or a corrected run could not use it
