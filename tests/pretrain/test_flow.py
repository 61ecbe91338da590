# SPDX-License-Identifier: Apache-2.0
"""The pretraining of emoji-flow: it runs, resumes, and writes a model that loads."""

import dataclasses
import functools
import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from tiny_model import random_params, relative_error

from gift_jax import convert
from gift_jax.data.sources import emoji
from gift_jax.diffusion import Denoiser, FlowMatching
from gift_jax.metrics import backbone
from gift_jax.models import load, mmdit
from gift_jax.models.mmdit.network import Network
from gift_jax.models.params import parameter_shapes
from gift_jax.pretrain import __main__ as pretrain
from gift_jax.pretrain import flow
from gift_jax.runtime.config import load_config
from gift_jax.state import merge_params

CONFIG = "configs/emoji_flow_pretrain.py"


@pytest.fixture
def few_images(monkeypatch):
    every = emoji.load()
    names = ("images", "concept_ids", "style_ids", "held_out")
    some = {name: getattr(every, name)[::19] for name in names}
    monkeypatch.setattr(emoji, "load", lambda: dataclasses.replace(every, **some))


def run(workdir, *flags):
    argv = [f"--config={CONFIG}:smoke", f"--workdir={workdir}", *flags]
    assert pretrain.main(argv) == 0
    return load.load_model(str(workdir / flow.FOLDER))


@pytest.mark.slow
@pytest.mark.usefixtures("few_images")
@pytest.mark.filterwarnings("ignore")  # diffusers' own
def test_a_stopped_run_goes_on_and_pytorch_draws_alike(tmp_path, capsys, monkeypatch):
    flag, workdir = "--config.checkpoint_every=1", tmp_path / "run"
    flat = flatten_dict(run(workdir, flag).denoiser_params, sep="/")
    steps = sorted((workdir / "flow" / "checkpoints").glob("[0-9]*"))
    assert [int(path.name) for path in steps] == [1, 2]
    for path in (steps[-1], workdir / flow.FOLDER / "transformer"):
        shutil.rmtree(path)  # as of a run that was stopped after its first step
    monkeypatch.setattr(flow.quality, "measure", lambda *_: None)  # which takes long
    model = run(workdir, flag)
    again = flatten_dict(model.denoiser_params, sep="/")
    for path, array in flat.items():
        np.testing.assert_array_equal(array, again[path])
    assert np.abs(flat["proj_out/kernel"]).max() > 0
    lines = (workdir / "flow" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["step"] == 2
    assert np.isfinite(json.loads(lines[-1])["flow/loss"])
    quality = json.loads((workdir / "quality" / "quality.json").read_text())
    assert 4 <= quality["samples"]["samples"] < 8
    assert model.latent_shape == (8, 8, 8) and model.image_size == 64
    assert model.module.repeats == 256 and model.module.patch_size == 1
    pytest.importorskip("diffusers")
    assert convert.main(["verify", f"--model={workdir / flow.FOLDER}"]) == 0
    assert re.search(r"differ by at most [012]/255", capsys.readouterr().out)


@pytest.mark.usefixtures("few_images")
def test_its_text_and_latents_are_those_of_emoji_sd(tmp_path):
    base = load.load_model("emoji-sd")
    flow.write_base(base, tmp_path / "flow", 1.0)
    text, prompts = flow.encoders(tmp_path / "flow"), ["a noto emoji of a bomb", ""]
    params = {
        name: flow.weights.load_component(tmp_path / "flow" / name, "text_encoder_2")[1]
        for name in text.components
    }
    ids = np.tile(base.tokenize(prompts), (1, 2))
    cond = jax.jit(text.encode)(params, ids)
    assert cond["states"].shape == (2, 33, 256)
    first, second = np.split(np.asarray(cond["states"])[:, :32], 2, axis=-1)
    np.testing.assert_array_equal(first, second)
    pooled, same = np.split(np.asarray(cond["pooled"]), 2, axis=-1)
    np.testing.assert_array_equal(pooled, same)
    embedded = backbone.load("judge").texts(prompts)
    unit = pooled / np.linalg.norm(pooled, axis=1, keepdims=True)
    embedded /= np.linalg.norm(embedded, axis=1, keepdims=True)
    assert relative_error(unit, embedded) < 1e-5
    images = emoji.load().images[:4].astype(np.float32) / 127.5 - 1
    ours, theirs = jax.jit(flow._encoder(base))(images), base.encode_images(images)
    for a, b in zip(ours, theirs, strict=True):
        assert relative_error(a, b) < 1e-4


def test_the_published_sizes_fit():
    cfg, base = load_config(CONFIG), load.abstract_model("emoji-sd")
    module = mmdit.build_transformer(flow.model_config(cfg.flow, base))
    count = sum(a.size for a in jax.tree.leaves(parameter_shapes(module)))
    assert 7e6 < count < 12e6
    others = ("vae", "text_encoder", "text_encoder", "tokenizer", "tokenizer")
    files = [f for n in others for f in (load.EMBEDDED / n).iterdir()]
    assert 2 * count + sum(f.stat().st_size for f in files) < 24.9e6


# --- the loss -------------------------------------------------------------------------


def test_new_blocks_return_what_they_are_given(rng):
    config = flow.model_config(
        load_config(f"{CONFIG}:smoke").flow, load.abstract_model("emoji-sd")
    )
    module = mmdit.build_transformer(config)
    params = flow.initial_params(module, jax.random.key(0))
    z, t = rng.normal(size=(2, 8, 8, 8)).astype(np.float32), jnp.ones(2)
    states, pooled = (
        rng.normal(size=s).astype(np.float32) for s in ((2, 3, 256), (2, 256))
    )
    args = z, t, states, pooled
    apply = functools.partial(mmdit.apply_transformer, module)
    run = jax.jit(lambda p: apply(p, *args, ("transformer",)))
    out, hiddens = run(params)
    assert not out.any()
    first, last = hiddens.values()
    np.testing.assert_array_equal(first, last)
    assert np.std(first) > 0.1
    loss = jax.jit(jax.grad(lambda p: jnp.mean((apply(p, *args)[0] - z) ** 2)))
    grads = loss(params)
    assert np.abs(grads["proj_out"]["kernel"]).max() > 0


@pytest.mark.parametrize("dropout", [0.0, 1.0])
def test_loss_is_that_of_a_pairs_own_caption_and_version(dropout, rng):
    cfg = load_config(f"{CONFIG}:smoke").flow
    cfg.unlock().update(variants=1, prompt_dropout=dropout)
    config = flow.model_config(cfg, load.abstract_model("emoji-sd"))
    module = mmdit.build_transformer(config)
    flat = flatten_dict(random_params(module, 0), sep="/")
    kept = {path: flat.pop(path) for path in ("pos_embed/pos_embed",)}
    sigmas = np.arange(10, 0, -1, dtype=np.float32) / 10
    denoiser = Denoiser(Network(module).predict, FlowMatching(sigmas))

    def cond(*shape):
        sizes = {"states": (3, 256), "pooled": (256,)}
        return {
            n: rng.normal(size=(*shape, *s)).astype(np.float32)
            for n, s in sizes.items()
        }

    frozen = {"kept": kept, "text": cond(1, 5), "empty": cond(1)}
    latents = {
        n: rng.normal(size=(2, 1, 8, 8, 8)).astype(np.float32) for n in ("mean", "std")
    }
    batch = {**latents, "caption": np.int32([4, 1])}
    key = jax.random.key(3)
    loss, _ = flow.make_loss(denoiser, cfg)(flat, frozen, batch, key)
    own = {n: a[0, [4, 1]] for n, a in frozen["text"].items()}
    none = {n: np.repeat(a, 2, axis=0) for n, a in frozen["empty"].items()}
    pairs = {n: a[:, 0] for n, a in latents.items()}
    losses = [
        jnp.mean(
            denoiser.losses(
                merge_params(flat, kept),
                {**pairs, "cond": c},
                jax.random.split(key, 4)[2],
            )[0]
        )
        for c in (own, none)
    ]
    assert abs(losses[0] - losses[1]) > 1e-3
    np.testing.assert_allclose(loss, losses[int(dropout)], rtol=1e-5)
