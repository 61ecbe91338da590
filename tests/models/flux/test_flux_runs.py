# SPDX-License-Identifier: Apache-2.0
"""FLUX.1 through the commands, where no flag says so."""

import re
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.numpy
from command_runs import CONFIGS, NO_SAMPLES, NOT_VERIFIED, changed
from ml_collections import ConfigDict
from tiny_model import write_pictures

from gift_jax import attack, convert, train
from gift_jax.benchmark import cells
from gift_jax.models import load
from gift_jax.models.sd.adapters import AdapterFiles
from gift_jax.runtime.errors import UserError
from gift_jax.sampling.images import Samples

pytestmark = pytest.mark.filterwarnings("ignore")  # diffusers' and peft's own
DENOISER = "transformer/diffusion_pytorch_model.safetensors"
OF_DATA = ("names=()", "augmented_copies=1", "num_generated=0", "batch=1")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("images"), 2, 0)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("GIFT_JAX_CACHE", str(tmp_path / "cache"))


def run(command, folder, workdir, config, groups, images, *flags):
    argv = [f"--config={CONFIGS / config}", f"--workdir={workdir}", NO_SAMPLES]
    argv += [f"--config.model={folder}", NOT_VERIFIED, "--config.steps=1"]
    for group in groups:
        argv += [f"--config.{group}.{field}" for field in OF_DATA]
        argv += [f"--config.{group}.folder={images}"]
        argv += [f"--config.{group}.prompt=a sks thing"]
    assert command.main([*argv, *flags]) == 0
    return workdir


def test_gift_moves_the_text_stream_alone(flux_folders, images, tmp_path):
    folder = flux_folders["dev"]
    args = folder, tmp_path / "run", "emoji_gift.py:smoke", ("harmful", "safe"), images
    nonce = (f"--config.{group}.nonce_prompts=0.0" for group in args[3])
    out = run(train, *args, *nonce, "--config.trainable=text_stream") / "export"
    moved = changed(folder, out, DENOISER)
    pattern = (
        r"^transformer_blocks\.0\.attn\.(add_[qkv]_proj|to_add_out|norm_added_[qk])"
    )
    assert moved and all(re.match(pattern, name) for name in moved)
    assert all(np.isfinite(difference).all() for difference in moved.values())
    assert any(np.abs(difference).max() > 0 for difference in moved.values())


def test_lora_is_diffusers(flux_folders, images, tmp_path, capsys):
    """Of both kinds of blocks, of feed-forwards and of CLIP: PyTorch loads the same."""
    folder = flux_folders["schnell"]
    args = folder, tmp_path / "run", "sd3_attack.py:lora_text_smoke", ("data",), images
    flags = ["--config.optimizer.lr=0.1"]
    flags += ["--config.lora.targets=to_q,to_k,to_v,to_out_0,add_k_proj,net_0/proj"]
    file = run(attack, *args, *flags) / "lora" / "pytorch_lora_weights.safetensors"
    names = safetensors.numpy.load_file(file).keys()
    for module in (
        "transformer.transformer_blocks.0.attn.add_k_proj",
        "transformer.transformer_blocks.0.ff_context.net.0.proj",
        "transformer.single_transformer_blocks.0.attn.to_v",
        "text_encoder.text_model.encoder.layers.0.self_attn.q_proj",
    ):
        assert any(name.startswith(f"{module}.") for name in names), module
    assert not any(name.startswith("text_encoder_2") for name in names)
    pytest.importorskip("diffusers")
    argv = ["verify", f"--model={folder}", f"--lora={file}", "--no-picture"]
    assert convert.main(argv) == 0
    assert re.search("4 components and 18 LoRA layers", capsys.readouterr().out)


def test_a_benchmark_knows_that_its_shift_is_the_images(flux_folders):
    fields = ConfigDict({"model": str(flux_folders["dev"]), "revision": ""})
    fields.samples = Samples(num=1, steps=4)
    cells._check_samples(SimpleNamespace(fields=fields))
    fields.samples = Samples(num=1, steps=1001)
    with pytest.raises(UserError, match="samples.steps=1001 must be at most 1000"):
        cells._check_samples(SimpleNamespace(fields=fields))


def test_what_cannot_be_is_one_line(flux_folders, images, tmp_path):
    folder, workdir = flux_folders["dev"], tmp_path / "run"
    groups = "harmful", "safe"
    gate = train, folder, workdir, "emoji_gift_gate.py:smoke", groups, images
    prompts = (f"--config.{group}.drawn_prompts={{concept}}" for group in groups)
    with pytest.raises(UserError, match="method=gift_gate needs a UNet"):
        run(*gate, *prompts)
    message = "is a FLUX.1, for which textual inversions are not supported; use LoRA"
    words = attack, folder, workdir, "emoji_attack.py:textual_inversion_smoke"
    with pytest.raises(UserError, match=message) as caught:
        run(*words, ("data",), images, "--config.data.prompt=a <thing>")
    assert "\n" not in str(caught.value)
    file = tmp_path / "a.safetensors"
    safetensors.numpy.save_file({"<a>": np.zeros((1, 32), np.float32)}, file)
    with pytest.raises(UserError, match=message):
        load.load_model(str(folder), added=AdapterFiles(textual_inversion=(str(file),)))
