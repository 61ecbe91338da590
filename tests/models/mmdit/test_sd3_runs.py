# SPDX-License-Identifier: Apache-2.0
"""Stable Diffusion 3 through the commands, where no flag says so."""

import pathlib
import re

import jax
import numpy as np
import pytest
import safetensors.numpy
from command_runs import CONFIGS, NO_SAMPLES, NOT_VERIFIED, changed, files, tensors
from flax.traverse_util import flatten_dict
from tiny_model import write_pictures
from tiny_sd3 import configs

from gift_jax import attack, convert, train
from gift_jax.compile import tpu
from gift_jax.models import load
from gift_jax.models.mmdit import random_weights
from gift_jax.models.sd.adapters import AdapterFiles
from gift_jax.runtime.config import load_config
from gift_jax.runtime.errors import UserError
from gift_jax.training import sharding

pytestmark = pytest.mark.filterwarnings("ignore")  # diffusers' and peft's own
DENOISER = "transformer/diffusion_pytorch_model.safetensors"
TEXT = ("text_encoder/model.safetensors", "text_encoder_2/model.safetensors")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny SD 3.5 medium of two layers, without T5; read only."""
    small = configs("sd3.5-medium", t5=False)
    small["transformer"] |= {"num_layers": 2, "dual_attention_layers": [0]}
    return random_weights.write(tmp_path_factory.mktemp("tiny") / "sd3", small)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("images"), 2, 0)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("GIFT_JAX_CACHE", str(tmp_path / "cache"))


def run_train(folder, images, workdir, config, *flags, groups=("harmful", "safe")):
    argv = [f"--config={CONFIGS / config}", f"--workdir={workdir}", NO_SAMPLES]
    argv += [f"--config.model={folder}", NOT_VERIFIED, "--config.steps=1"]
    for group in groups:
        argv += [
            f"--config.{group}.names=()",
            f"--config.{group}.folder={images}",
            f"--config.{group}.prompt=a thing",
            f"--config.{group}.batch=2",
            f"--config.{group}.augmented_copies=1",
            f"--config.{group}.num_generated=0",
            f"--config.{group}.nonce_prompts=0.0",
        ]
    assert train.main([*argv, *flags]) == 0
    return workdir / "export"


def run_attack(folder, images, workdir, config, *flags, prompt="a sks thing"):
    argv = [f"--config={CONFIGS / config}_smoke", NO_SAMPLES, NOT_VERIFIED]
    argv += [f"--config.model={folder}", f"--workdir={workdir}"]
    argv += [f"--config.data.folder={images}", f"--config.data.prompt={prompt}"]
    argv += ["--config.data.names=()", "--config.data.num_generated=0"]
    argv += ["--config.data.batch=2", "--config.data.augmented_copies=1"]
    argv += ["--config.steps=1"]
    assert attack.main([*argv, *flags]) == 0
    return workdir


def pipeline(folder):
    diffusers = pytest.importorskip("diffusers")
    pipe = diffusers.StableDiffusion3Pipeline.from_pretrained(
        str(folder), text_encoder_3=None, tokenizer_3=None
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def drawn(pipe, prompt="a sks thing"):
    import torch

    return pipe(
        prompt,
        num_inference_steps=2,
        height=16,
        width=16,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
    ).images


def assert_same_weights(folder, export, **added):
    """Of a model with files that are added to it, and of one that has them merged."""
    ours, theirs = (
        flatten_dict(model.params, sep="/")
        for model in (
            load.load_model(str(folder), added=AdapterFiles(**added)),
            load.load_model(str(export)),
        )
    )
    for path, array in ours.items():
        np.testing.assert_allclose(array, theirs[path], atol=1e-6, err_msg=path)


# --- train ----------------------------------------------------------------------------

STREAMS = {  # what a trainable set changes, by the names of diffusers
    "text": r"\.attn\.(add_[qkv]_proj|to_add_out|norm_added_[qk])\.",
    "image": r"\.attn2?\.(to_[qkv]|to_out\.0|norm_[qk])\.",
}
DEFENSES = [  # (config, trainable, streams it changes, its groups)
    ("sd3_object.py:smoke", "cross_attention", ("text",), ("harmful", "safe")),
    pytest.param(
        "emoji_gift_adversarial.py:smoke",
        *("text_stream", ("text",), ("harmful", "safe")),
        marks=pytest.mark.slow,
    ),
    ("emoji_baselines.py:esd_smoke", "image_stream", ("image",), ("harmful",)),
    pytest.param(
        "emoji_baselines.py:imma_smoke",
        *("attention", ("text", "image"), ("harmful",)),
        marks=pytest.mark.slow,
    ),
    ("emoji_baselines.py:maximize_smoke", "all", (), ("harmful", "safe")),
]


@pytest.mark.parametrize("config, trainable, streams, groups", DEFENSES)
def test_defenses(folder, images, tmp_path, config, trainable, streams, groups):
    flag = f"--config.trainable={trainable}"
    out = run_train(folder, images, tmp_path / "run", config, flag, groups=groups)
    moved = changed(folder, out, DENOISER)
    for name, pattern in STREAMS.items():
        count = sum(bool(re.search(pattern, tensor)) for tensor in moved)
        assert bool(count) == (name in streams or not streams), name
    is_attention = [".attn" in name for name in moved]
    assert all(is_attention) == bool(streams)
    assert "pos_embed.pos_embed" not in moved
    assert all(np.isfinite(difference).all() for difference in moved.values())
    assert files(folder) == files(out) - {pathlib.PurePath("README.md")}
    assert not any(changed(folder, out, file) for file in TEXT)


def test_gate(folder, images, tmp_path):
    """A detector, then the rest: its channels of the table of positions are scaled."""
    flags = [
        f"--config.{group}.drawn_prompts={{concept}}" for group in ("harmful", "safe")
    ]
    run, config = tmp_path / "run", "emoji_gift_gate.py:smoke"
    out = run_train(folder, images, run, config, *flags)
    assert (run / "preserve" / "metrics.jsonl").is_file()
    moved = changed(folder, out, DENOISER)
    table = tensors(folder, DENOISER)["pos_embed.pos_embed"]
    ratio = (table + moved["pos_embed.pos_embed"]) / table
    assert np.isclose(ratio, 1000.0, rtol=1e-3).mean() > 0.5
    assert all(np.isfinite(difference).all() for difference in moved.values())
    assert files(folder) == files(out) - {pathlib.PurePath("README.md")}
    assert not any(changed(folder, out, file) for file in TEXT)


def test_changed_tensors_are_added_to_the_base(folder, images, tmp_path):
    run = tmp_path / "run"
    flag = "--config.upper.lr=0.1"
    config = "emoji_baselines.py:maximize_prior_smoke"
    out, file = run_train(folder, images, run, config, flag), tmp_path / "a.safetensors"
    argv = ["to-unet-state", f"--checkpoint={run / 'checkpoints'}", f"--out={file}"]
    assert convert.main(argv) == 0
    moved = changed(folder, out, DENOISER)
    assert safetensors.numpy.load_file(file).keys() == moved.keys()
    assert_same_weights(folder, out, unet_tensors=(str(file),))
    message = "x is no tensor of this model's transformer by diffusers' names"
    safetensors.numpy.save_file({"x": np.zeros(2, np.float32)}, file)
    with pytest.raises(UserError, match=message):
        assert_same_weights(folder, out, unet_tensors=(str(file),))


def test_defenses_that_cannot_are_one_line(folder, images, tmp_path):
    for config, message, *flags in (
        ("emoji_baselines.py:uce_smoke", "transformer has no projections that read"),
        (
            "emoji_gift.py:smoke",
            "layers=resnet: a transformer has no layers of kind resnet; choose from t",
            "--config.gift.layers=resnet",
        ),
        (
            "emoji_gift.py:smoke",
            "trainable='non_cross_attention' must be one of cross_attention, text_str",
            "--config.trainable=non_cross_attention",
        ),
    ):
        with pytest.raises(UserError, match=message) as caught:
            run_train(folder, images, tmp_path / "run", config, *flags)
        assert "\n" not in str(caught.value)


# --- attack ---------------------------------------------------------------------------


def test_lora_is_diffusers(folder, images, tmp_path, capsys):
    """Of both streams and both CLIPs: merged, in the file for PyTorch, added here."""
    run = run_attack(
        folder,
        images,
        tmp_path / "run",
        "sd3_attack.py:lora_text",
        "--config.optimizer.lr=0.1",
    )
    assert not (run / "lora" / "kohya.safetensors").exists()
    file = run / "lora" / "pytorch_lora_weights.safetensors"
    names = safetensors.numpy.load_file(file).keys()
    prefix = "transformer.transformer_blocks.0.attn.add_k_proj"
    assert {f"{prefix}.lora_A.weight", f"{prefix}.lora_B.weight"} <= names
    assert len([name for name in names if name.startswith("transformer.")]) == 2 * 15
    merged, before = (drawn(pipeline(f)) for f in (run / "export", folder))
    assert np.abs(merged - before).max() > 0.02
    pipe = pipeline(folder)
    pipe.load_lora_weights(str(file))
    assert set(pipe.get_list_adapters()) == {
        "transformer",
        "text_encoder",
        "text_encoder_2",
    }
    assert np.abs(drawn(pipe) - merged).max() < 1 / 255
    assert_same_weights(folder, run / "export", lora=(str(file),))
    argv = ["verify", f"--model={folder}", f"--lora={file}", "--no-picture"]
    assert convert.main(argv) == 0
    assert re.search("4 components and 35 LoRA layers", capsys.readouterr().out)
    out = tmp_path / "renamed.safetensors"
    argv = ["rename-lora", f"--model={folder}", f"--lora={file}", f"--out={out}"]
    with pytest.raises(UserError, match="names=kohya: there are none for a transform"):
        convert.main([*argv, "--names=kohya"])
    assert convert.main([*argv, "--names=diffusers"]) == 0
    assert_same_weights(folder, run / "export", lora=(str(out),))


def test_lora_of_other_projections_is_one_line(tiny_folder, images, tmp_path):
    message = "targets=add_q_proj: a UNet has none of these projections; choose from to"
    flag = "--config.lora.targets=add_q_proj"
    with pytest.raises(UserError, match=message):
        run_attack(tiny_folder, images, tmp_path / "run", "sd3_attack.py:lora", flag)


@pytest.mark.slow
def test_dreambooth_trains_what_pytorch_does(folder, images, tmp_path):
    run = run_attack(
        folder,
        images,
        tmp_path / "run",
        "sd3_attack.py:dreambooth",
        "--config.dreambooth.train_text_encoder=true",
        "--config.optimizer.weight_decay=0.1",
    )
    moved = changed(folder, run / "export", DENOISER)
    assert set(tensors(folder, DENOISER)) - set(moved) == {"pos_embed.pos_embed"}
    for file in TEXT:  # the first one's projection is of its own, too
        assert "text_projection.weight" in changed(folder, run / "export", file)
    assert drawn(pipeline(run / "export")).std() > 0.01


def test_textual_inversion_is_refused(folder, images, tmp_path):
    """PyTorch's pipeline has no way to load the words."""
    pipelines = pytest.importorskip("diffusers").StableDiffusion3Pipeline
    assert not hasattr(pipelines, "load_textual_inversion")
    message = "is a Stable Diffusion 3, for which diffusers loads no textual inversions"
    with pytest.raises(UserError, match=message) as caught:
        config = "emoji_attack.py:textual_inversion"
        run_attack(folder, images, tmp_path / "run", config, prompt="a <thing>")
    assert "\n" not in str(caught.value)
    file = tmp_path / "a.safetensors"
    safetensors.numpy.save_file({"<a>": np.zeros((1, 32), np.float32)}, file)
    with pytest.raises(UserError, match=message):
        load.load_model(str(folder), added=AdapterFiles(textual_inversion=(str(file),)))


# --- compile --------------------------------------------------------------------------


@pytest.mark.slow
def test_the_step_of_the_published_model_can_be_compiled(monkeypatch):
    monkeypatch.setattr(load.hub, "fetch", None)
    cfg = load_config(str(CONFIGS / "sd3_object.py"))
    for group in ("harmful", "safe"):
        cfg[group].update(tpu.NO_DATA)
    mesh = sharding.make_mesh(jax.devices()[:1])
    step, (state, frozen, batch, key) = tpu.train_step(train.resolve(cfg), mesh)
    assert sum(a.size for a in state.params.values()) == 224_282_112
    assert batch["safe"]["cond"]["states"].shape == (1, 77 + 256, 4096)
    assert batch["safe"]["mean"].shape == (1, 16, 128, 128)
    assert {str(a.dtype) for a in frozen["network"].values()} == {"bfloat16"}
