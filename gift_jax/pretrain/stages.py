# SPDX-License-Identifier: Apache-2.0
"""The stages that make the embedded model."""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from gift_jax.data import captions, pipeline
from gift_jax.data.sources import emoji
from gift_jax.models import exports, sd, vision
from gift_jax.models.params import init_params
from gift_jax.models.sd import architectures
from gift_jax.models.sd.scheduler_config import alphas_cumprod
from gift_jax.models.tokenizer import load_tokenizer
from gift_jax.pretrain import clip as clip_stage
from gift_jax.pretrain import quality, stage
from gift_jax.pretrain import tokenizer as tokenizer_stage
from gift_jax.pretrain import unet as unet_stage
from gift_jax.pretrain import vae as vae_stage
from gift_jax.runtime.workdir import prepare_workdir
from gift_jax.training import sharding

STAGES = ("clip", "vae", "decoder", "unet")
STORED = "float16"  # dtype of the files: half the size, 0.05% relative rounding


def run(cfg, workdir: pathlib.Path) -> None:
    """Runs every stage that is not finished; writes and measures the model folders."""
    mesh = sharding.make_default_mesh(cfg.cpu_devices)
    for name in STAGES:
        sharding.check_batch(f"{name}.batch", cfg[name].batch, mesh)
    prepare_workdir(cfg, workdir)
    data = emoji.load()
    stages = Stages(cfg, workdir, data, mesh)
    clip = stages.clip()
    vae_config, vae_params = stages.vae()
    vae = vae_config, {**vae_params, **stages.decoder(vae_config, vae_params)}
    _write_base(workdir, *clip, *vae)
    unet_config, unet_params = stages.unet(clip, vae)
    folder = workdir / "emoji-sd"
    exports.save_model_folder(folder / "unet", unet_config, unet_params, dtype=STORED)
    logging.info("wrote %s", folder)
    quality.measure(folder, workdir / "judge", workdir / "quality", cfg.quality)


class Stages:
    """The stages of one run: its config, folder, data and devices."""

    def __init__(self, cfg, workdir: pathlib.Path, data: emoji.Emoji, mesh):
        self._cfg, self._workdir, self._data, self._mesh = cfg, workdir, data, mesh
        self._tokenizer = _make_tokenizer(cfg, workdir, data)

    def clip(self):
        """Returns (config, parameters) of the CLIP."""
        cfg, data = self._cfg, self._data
        config = clip_stage.model_config(cfg.clip, len(self._tokenizer))
        model = vision.build_clip(config)
        tables = clip_stage.caption_tables(
            self._tokenizer, data.concepts, data.styles, cfg.clip.tokens
        )
        counts = len(data.concepts), len(data.styles)
        init = functools.partial(clip_stage.init_params, model, *counts)
        params = jax.jit(init)(jax.random.key(cfg.seed))
        loss_fn = clip_stage.make_loss(model, cfg.clip)
        frozen = {"captions": tables}
        return config, self._train("clip", params, loss_fn, frozen=frozen)["clip"]

    def vae(self):
        """Returns (config, parameters) of the VAE."""
        config = vae_stage.model_config(self._cfg.vae)
        model = sd.build_vae(config)

        params = _init(model, self._cfg.seed + 1)
        loss_fn = vae_stage.make_loss(model, self._cfg.vae)
        params = self._train("vae", params, loss_fn)
        scale = _scaling_factor(model, params, self._data)
        return {**config, "scaling_factor": scale}, params

    def decoder(self, config, params):
        """Returns those of the VAE's parameters that its decoder trains."""
        model = sd.build_vae(config)
        trained = {name: params[name] for name in ("decoder", "post_quant_conv")}
        frozen = {name: params[name] for name in params if name not in trained}
        loss_fn = vae_stage.make_decoder_loss(model, self._cfg.decoder)
        return self._train("decoder", trained, loss_fn, frozen={"encoder": frozen})

    def unet(self, clip, vae):
        """Returns (config, parameters) of the UNet."""
        cfg, data = self._cfg, self._data
        channels = cfg.vae.latent_channels
        size = 64 // 2 ** (len(cfg.vae.channels) - 1)
        config = unet_stage.model_config(cfg.unet, channels, size, cfg.clip.text_width)
        model = sd.build_unet(config)
        rows = unet_stage.known_rows(data)
        latents = unet_stage.augmented_latents(
            jax.random.key(cfg.seed + 2), _make_encoder(*vae), data, rows, cfg.unet
        )
        index = np.arange(len(rows), dtype=np.int32)
        source = pipeline.ArraySource({**latents, "caption": index})
        text, empty = self._text_states(*clip, rows)

        params = _init(model, cfg.seed + 3)
        loss_fn = unet_stage.make_loss(model, cfg.unet)
        abar = alphas_cumprod(unet_stage.SCHEDULER)
        frozen = {"text": text, "empty": empty, "abar": abar.astype(np.float32)}
        decay = stage.growing_decay(cfg.unet.ema)
        params = self._train(
            "unet", params, loss_fn, source, frozen=frozen, decay=decay
        )
        return config, params

    def _train(self, name, params, loss_fn, source=None, **options):
        """Trains one stage; returns its averaged parameters on the host."""
        where = self._cfg, self._workdir, self._mesh, name
        source, number = source or _image_source(self._data), STAGES.index(name)
        return stage.train(*where, params, loss_fn, source, number=number, **options)

    def _text_states(self, config, params, rows):
        """Returns float32 "V N L D" for all rows and templates, and "L D" for ""."""
        tower = sd.build_text(config["text_config"])
        params = {"text_model": params["text_model"]}
        encode = jax.jit(lambda p, ids: sd.apply_text(tower, p, ids)[0])
        length, data = self._cfg.clip.tokens, self._data

        def states(texts):
            options = dict(padding="max_length", truncation=True, max_length=length)
            ids = self._tokenizer(texts, **options).input_ids
            return np.asarray(encode(params, np.asarray(ids, np.int32)))

        text = [states(texts) for texts in unet_stage.captions_of(data, rows)]
        return np.stack(text), states([""])[0]


def _init(model, seed: int):
    return jax.jit(functools.partial(init_params, model))(jax.random.key(seed))


def _make_tokenizer(cfg, workdir, data):
    folder = workdir / "emoji-sd" / "tokenizer"
    if not (folder / "tokenizer_config.json").exists():
        texts = (
            captions.fill(template, concept, style)
            for concept in data.concepts
            for style in data.styles
            for template in captions.TEMPLATES
        )
        size = tokenizer_stage.write(folder, texts, cfg.clip.tokens)
        logging.info("tokenizer of %d tokens", size)
    return load_tokenizer(folder)


def _image_source(data):
    """Returns the images that training may see, with their labels."""
    rows = ~data.held_out
    may_flip = np.asarray([captions.may_flip(name) for name in data.concepts])
    return pipeline.ArraySource(
        {
            "image": data.images[rows],
            "concept": data.concept_ids[rows],
            "style": data.style_ids[rows],
            "may_flip": may_flip[data.concept_ids[rows]],
        }
    )


def _make_encoder(config, params):
    """Returns images "B H W 3" in [-1, 1] -> scaled (mean, std), "B C h w"."""
    model, scale = sd.build_vae(config), config["scaling_factor"]

    def encode(x_BHWC):
        x_BCHW = jnp.transpose(x_BHWC, (0, 3, 1, 2))
        mean, logvar = sd.apply_vae_encode(model, params, x_BCHW)
        return scale * mean, scale * jnp.exp(0.5 * logvar)

    return encode


def _scaling_factor(model, params, data) -> float:
    """Returns 1 / standard deviation of the latents, to three digits."""

    @jax.jit
    def encode(params, x_BCHW):
        return sd.apply_vae_encode(model, params, x_BCHW)[0]

    rows = np.flatnonzero(~data.held_out)[::7]
    x_BHWC = jnp.asarray(data.images[rows], jnp.float32) / 127.5 - 1.0
    mean = encode(params, jnp.transpose(x_BHWC, (0, 3, 1, 2)))
    return float(f"{1.0 / float(jnp.std(mean)):.3g}")


def _write_base(workdir, clip_config, clip_params, vae_config, vae_params) -> None:
    """Writes all of the diffusers folder but the UNet, and the judge beside it."""
    folder = workdir / "emoji-sd"
    text_config = {
        "architectures": ["CLIPTextModel"],
        "torch_dtype": "float32",  # to load as, whatever is stored
        **clip_config["text_config"],
    }
    text_params = {"text_model": clip_params["text_model"]}
    text_folder = folder / "text_encoder"
    exports.save_model_folder(text_folder, text_config, text_params, dtype=STORED)
    exports.save_model_folder(folder / "vae", vae_config, vae_params, dtype=STORED)
    own = {k: v for k, v in clip_params.items() if k != "text_model"}  # it shares that
    exports.save_model_folder(workdir / "judge", clip_config, own, dtype=STORED)
    _write_json(folder / "scheduler" / "scheduler_config.json", unet_stage.SCHEDULER)
    index = architectures.model_index("DDIMScheduler")
    _write_json(folder / "model_index.json", index)


def _write_json(path: pathlib.Path, value: dict) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n")
