# SPDX-License-Identifier: Apache-2.0
"""Runs of the commands on the tiny model that several test files look at: read only."""

import json
import pathlib

import numpy as np
import pytest
import safetensors.numpy

CONFIGS = pathlib.Path(__file__).resolve().parents[1] / "configs"
NO_SAMPLES = "--config.samples.num=0"
NOT_VERIFIED = "--config.verify=off"  # takes as long as a run of the tiny model
UNET_FILE = "unet/diffusion_pytorch_model.safetensors"
TEXT_FILE = "text_encoder/model.safetensors"


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory):
    """A folder of four images of the tiny model's size."""
    from tiny_model import write_pictures

    return write_pictures(tmp_path_factory.mktemp("image_folder"), 4, 3)


@pytest.fixture(scope="session")
def run_train(tiny_folder, image_folder):
    """(workdir, flags) -> the folder of a train run, on `image_folder`."""
    from gift_jax import train

    def call(workdir, *flags, config="emoji_gift.py:smoke", embedded=False):
        argv = [f"--config={CONFIGS / config}", f"--workdir={workdir}"]
        argv += [f"--config.model={tiny_folder}", NOT_VERIFIED]
        for group in () if embedded else ("harmful", "safe"):
            argv += [
                f"--config.{group}.names=()",
                f"--config.{group}.folder={image_folder}",
                f"--config.{group}.prompt=a {group} thing",
            ]
        assert train.main([*argv, *flags]) == 0
        return workdir

    return call


@pytest.fixture(scope="session")
def run_attack(tiny_folder, image_folder):
    """(workdir, flags) -> the folder of an attack's run, on `image_folder`."""
    from gift_jax import attack

    def call(workdir, *flags, config="emoji_attack.py:smoke", prompt="a sks thing"):
        argv = [f"--config={CONFIGS / config}", f"--workdir={workdir}"]
        argv += [f"--config.model={tiny_folder}", f"--config.data.prompt={prompt}"]
        argv += ["--config.data.names=()", f"--config.data.folder={image_folder}"]
        argv += [NOT_VERIFIED]
        assert attack.main([*argv, *flags]) == 0
        return workdir

    return call


IMMUNIZED = ("--config.harmful.names=bomb,pill", "--config.checkpoints.every=1")


@pytest.fixture(scope="session")
def immunized(run_train, tmp_path_factory):
    """GIFT's smoke run on embedded images, with samples and each step's checkpoint."""
    workdir = tmp_path_factory.mktemp("immunized") / "run"
    return run_train(workdir, *IMMUNIZED, embedded=True)


LORA = (
    "--config.compute_dtype=bfloat16",
    "--config.steps=3",
    "--config.checkpoints.every=1",
    "--config.lora.rank=2",
    "--config.lora.alpha=7",
    "--config.lora.targets=to_k,to_out_0",
    "--config.optimizer.lr=0.05",
    "--config.samples.prompts=a dog",
    "--config.samples.at_steps=0,1,3",
)


@pytest.fixture(scope="session")
def lora_run(run_attack, tmp_path_factory):
    """LoRA of two projections, drawn from at three steps, in half precision."""
    return run_attack(tmp_path_factory.mktemp("lora") / "run", *LORA)


@pytest.fixture(scope="session")
def dreambooth_run(run_attack, tmp_path_factory):
    """DreamBooth of the UNet and the text encoder."""
    return run_attack(
        tmp_path_factory.mktemp("dreambooth") / "run",
        "--config.dreambooth.train_text_encoder=true",
        NO_SAMPLES,
        config="emoji_attack.py:dreambooth_smoke",
    )


INVERSION = (
    "--config.textual_inversion.initializer=a",
    "--config.textual_inversion.vectors=2",
    "--config.optimizer.lr=0.5",
    NO_SAMPLES,
)


@pytest.fixture(scope="session")
def inversion_run(run_attack, tmp_path_factory):
    """Textual inversion of two vectors."""
    workdir = tmp_path_factory.mktemp("inversion") / "run"
    config = "emoji_attack.py:textual_inversion_smoke"
    return run_attack(workdir, *INVERSION, config=config, prompt="a <thing>")


# --- what a run has written -----------------------------------------------------------


def tensors(folder, file=UNET_FILE):
    """Returns {name: array} of a component's file."""
    return safetensors.numpy.load_file(folder / file)


def changed(base, folder, file=UNET_FILE):
    """Returns {name: difference} of the tensors whose bytes differ."""
    old, new = tensors(base, file), tensors(folder, file)
    assert set(old) == set(new)
    return {
        name: np.asarray(new[name], np.float32) - np.asarray(old[name], np.float32)
        for name in old
        if old[name].tobytes() != new[name].tobytes()
    }


def files(folder):
    """Returns the paths of all files, relative to the folder."""
    return {p.relative_to(folder) for p in folder.rglob("*") if p.is_file()}


def recorded(workdir):
    """Returns a run's config.json."""
    return json.loads((workdir / "config.json").read_text())


def logged(workdir):
    """Returns the lines of metrics.jsonl, without what depends on the clock."""
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [
        {k: v for k, v in json.loads(line).items() if not k.startswith("time/")}
        for line in lines
    ]
