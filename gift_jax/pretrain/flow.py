# SPDX-License-Identifier: Apache-2.0
"""emoji-flow: a small transformer (MMDiT) of flow matching on emoji-sd's latents.

VAE, tokenizer and text encoder are emoji-sd's. The folder is a Stable Diffusion 3's
without T5: both of its text encoders are that one, with the judge's projection, and the
transformer reads the two side by side, each prompt twice.
"""

import pathlib
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax.traverse_util import flatten_dict, unflatten_dict

from gift_jax.data import pipeline
from gift_jax.data.sources import emoji
from gift_jax.diffusion import Denoiser
from gift_jax.metrics.backbone import JUDGE
from gift_jax.models import (
    exports,
    flow_schedule,
    load,
    mmdit,
    safetensors_io,
    weights,
)
from gift_jax.models.batching import map_powers_of_two
from gift_jax.models.mmdit import architectures
from gift_jax.models.mmdit.network import Network
from gift_jax.models.mmdit.text import T5_LENGTH, TextEncoders
from gift_jax.models.params import init_params
from gift_jax.models.sd.clip import build_projected_text
from gift_jax.models.trainable import select_trainable
from gift_jax.pretrain import quality, stage
from gift_jax.pretrain import unet as unet_stage
from gift_jax.runtime import files
from gift_jax.runtime.workdir import prepare_workdir
from gift_jax.state import Loss, merge_params
from gift_jax.training import sharding

FOLDER = "emoji-flow"
STORED = "float16"
_BATCH = 256  # captions encoded at once
_ENCODERS = ("text_encoder", "text_encoder_2")
# that begin at zero, so that every block returns what it is given
_ZERO = ("/norm1/linear/", "/norm1_context/linear/", "/norm_out/linear/", "/proj_out/")


def run(cfg, workdir: pathlib.Path) -> None:
    """Trains what is not finished; writes and measures the model folder."""
    mesh = sharding.make_default_mesh(cfg.cpu_devices)
    sharding.check_batch("flow.batch", cfg.flow.batch, mesh)
    base = load.load_model(cfg.base)
    prepare_workdir(cfg, workdir, base=base.folder.content_hash())
    folder = workdir / FOLDER
    write_base(base, folder, cfg.flow.schedule_shift)
    config = model_config(cfg.flow, base)
    params = _train(cfg, workdir, mesh, base, config)
    exports.save_model_folder(folder / "transformer", config, params, dtype=STORED)
    logging.info("wrote %s", folder)
    quality.measure(folder, JUDGE, workdir / "quality", cfg.quality)


def model_config(cfg, base) -> dict:
    """Returns SD3Transformer2DModel's config.json for the sizes in cfg.flow.

    Args: base: the model whose latents and text it reads.
    """
    channels, side, _ = base.latent_shape
    text = base.text_encoder.config
    return architectures.TRANSFORMER | {
        "attention_head_dim": cfg.width // cfg.heads,
        "caption_projection_dim": cfg.width,
        "in_channels": channels,
        "joint_attention_dim": len(_ENCODERS) * text.hidden_size,
        "num_attention_heads": cfg.heads,
        "num_layers": cfg.layers,
        "out_channels": channels,
        "patch_size": 1,
        "pooled_projection_dim": len(_ENCODERS) * _projection().shape[0],
        "pos_embed_max_size": 2 * side,
        "qk_norm": "rms_norm",
        "sample_size": side,
    }


def _projection() -> np.ndarray:
    """Returns the judge's projection of pooled text, float32 "P D"."""
    name, file = "text_projection.weight", JUDGE / "model.safetensors"
    entry = safetensors_io.read_header(file)[name]
    return np.asarray(safetensors_io.read_tensor(name, entry), np.float32)


def scheduler_config(shift: float) -> dict:
    """Returns the scheduler_config.json; shift: see `flow_schedule.shifted`."""
    return architectures.SCHEDULER | {"shift": shift}


def write_base(base, folder: pathlib.Path, shift: float) -> None:
    """Writes all of the diffusers folder but the transformer.

    Args: base: the model that VAE, tokenizer and text encoder are taken from.
    """
    vae = safetensors_io.read_json(base.path / "vae" / "config.json")
    _copy(base.path / "vae", folder / "vae")
    # PyTorch's pipeline adds it to the latents, and cannot add None
    files.write_json(folder / "vae" / "config.json", vae | {"shift_factor": 0.0})
    text = safetensors_io.read_json(base.path / "text_encoder" / "config.json")
    projection = _projection()
    text |= {
        "architectures": ["CLIPTextModelWithProjection"],
        "projection_dim": len(projection),
    }
    params = base.params["text_encoder"] | {"text_projection": {"kernel": projection.T}}
    for name in _ENCODERS:
        exports.save_model_folder(folder / name, text, params, dtype=STORED)
        tokenizer = name.replace("text_encoder", "tokenizer")
        _copy(base.path / "tokenizer", folder / tokenizer)
    config = scheduler_config(shift)
    files.write_json(folder / "scheduler" / "scheduler_config.json", config)
    none = {name: [None, None] for name in ("text_encoder_3", "tokenizer_3")}
    index = architectures.model_index(config["_class_name"]) | none
    files.write_json(folder / "model_index.json", index)


def _copy(source: pathlib.Path, target: pathlib.Path) -> None:
    shutil.copytree(source, target, dirs_exist_ok=True)


# --- training -------------------------------------------------------------------------


def _train(cfg, workdir, mesh, base, config) -> dict[str, Any]:
    """Returns the transformer's parameters, averaged, nested."""
    data = emoji.load()
    rows = unet_stage.known_rows(data)
    text = encoders(workdir / FOLDER)
    module = mmdit.build_transformer(config).clone(repeats=text.repeats)
    params = initial_params(module, jax.random.key(cfg.seed))
    trained, kept = select_trainable(params, "all", mmdit.TRAINABLE_SETS)
    key = jax.random.fold_in(jax.random.key(cfg.seed), 2)
    latents = unet_stage.augmented_latents(key, _encoder(base), data, rows, cfg.flow)
    index = np.arange(len(rows), dtype=np.int32)
    scheduler = scheduler_config(cfg.flow.schedule_shift)
    denoiser = Denoiser(Network(module).predict, flow_schedule.noise_process(scheduler))
    frozen = {"kept": kept, **_text_cond(base, text, workdir / FOLDER, data, rows)}
    averaged = stage.train(
        cfg,
        workdir,
        mesh,
        "flow",
        trained,
        make_loss(denoiser, cfg.flow),
        pipeline.ArraySource({**latents, "caption": index}),
        frozen=frozen,
        decay=stage.growing_decay(cfg.flow.ema),
    )
    return merge_params(averaged, jax.device_get(kept))


def initial_params(module, key: jax.Array) -> dict[str, Any]:
    """Returns a transformer's random parameters, its modulations and output zero.

    Source: Peebles and Xie 2023 (arXiv:2212.09748), "adaLN-Zero".
    """
    params = jax.jit(lambda key: init_params(module, key))(key)
    flat = flatten_dict(params, sep="/")
    for path, array in flat.items():
        if any(name in f"/{path}" for name in _ZERO):
            flat[path] = jnp.zeros_like(array)
    return unflatten_dict(flat, sep="/")


def make_loss(denoiser: Denoiser, cfg) -> Loss:
    """Returns the loss of flow matching, see `Denoiser.losses`, on flat parameters.

    frozen: kept: flat parameters that do not train; text: {name: float32 "V N ..."},
    the conditioning of the N captions known, in V templates; empty: that of "", "1
    ...". batch: mean, std: "B V C h w"; caption: int32 "B".
    """

    def loss_fn(params, frozen, batch, key):
        k_template, k_variant, k_loss, k_drop = jax.random.split(key, 4)
        B = batch["caption"].shape[0]
        templates = len(frozen["text"]["states"])
        template = jax.random.randint(k_template, (B,), 0, templates)
        variant = jax.random.randint(k_variant, (B,), 0, cfg.variants)
        drop_B = jax.random.uniform(k_drop, (B,)) < cfg.prompt_dropout

        def pick(text, empty):
            own = text[template, batch["caption"]]
            return jnp.where(drop_B.reshape(B, *[1] * (own.ndim - 1)), empty, own)

        pairs = {name: batch[name][jnp.arange(B), variant] for name in ("mean", "std")}
        pairs["cond"] = jax.tree.map(pick, frozen["text"], frozen["empty"])
        network = merge_params(params, frozen["kept"])
        return jnp.mean(denoiser.losses(network, pairs, k_loss)[0]), {}

    return loss_fn


def _encoder(base):
    """Returns images "B H W 3" in [-1, 1] -> scaled (mean, std), "B C h w"."""

    def encode(x_BHWC):
        mean, std = base.autoencoder.encode(base.vae_params, x_BHWC)
        return base.latent_scale.scaled(mean), std * base.latent_scale.factor

    return encode


def encoders(folder: pathlib.Path) -> TextEncoders:
    """Returns the modules of a folder's two text encoders."""
    configs = (safetensors_io.read_json(folder / n / "config.json") for n in _ENCODERS)
    first, second = (build_projected_text(config) for config in configs)
    width = first.config.hidden_size + second.config.hidden_size
    length = first.config.max_position_embeddings
    return TextEncoders((first, second), None, width, length, T5_LENGTH)


def _text_cond(base, text: TextEncoders, folder, data, rows) -> dict[str, Any]:
    """Returns what `make_loss` asks for of all rows and templates, and of ""."""
    params = {
        name: weights.load_component(folder / name, "text_encoder_2")[1]
        for name in _ENCODERS
    }
    encode = jax.jit(text.encode)

    def cond(prompts):
        ids = np.tile(base.tokenize(prompts), (1, len(_ENCODERS)))
        return map_powers_of_two(lambda some: encode(params, some), ids, _BATCH)

    conds = [cond(prompts) for prompts in unet_stage.captions_of(data, rows)]
    return {
        "text": jax.tree.map(lambda *some: np.stack(some), *conds),
        "empty": cond([""]),
    }
