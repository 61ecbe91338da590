# SPDX-License-Identifier: Apache-2.0
"""The stages that make the embedded model."""

import functools
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging

from gift_jax.data import captions, pipeline
from gift_jax.data.sources import emoji
from gift_jax.models import sd, vision, weights
from gift_jax.pretrain import clip as clip_stage
from gift_jax.pretrain import tokenizer as tokenizer_stage
from gift_jax.pretrain import unet as unet_stage
from gift_jax.pretrain import vae as vae_stage
from gift_jax.runtime.workdir import prepare_workdir
from gift_jax.state import init_state
from gift_jax.training import loop, sharding

STAGES = ("clip", "vae", "decoder", "unet")
STORED = "float16"  # dtype of the files: half the size, 0.05% relative rounding


def run(cfg, workdir: pathlib.Path) -> None:
    """Runs every stage that is not finished and writes the model folders."""
    mesh = sharding.make_default_mesh(cfg.cpu_devices)
    for name in STAGES:
        sharding.check_batch(f"{name}.batch", cfg[name].batch, mesh)
    prepare_workdir(cfg, workdir)
    pictures = emoji.load()
    words = _tokenizer(cfg, workdir, pictures)
    clip = _clip(cfg, workdir, pictures, words, mesh)
    vae = _vae(cfg, workdir, pictures, mesh)
    vae = (vae[0], _decoder(cfg, workdir, pictures, vae, mesh))
    _write_base(workdir, *clip, *vae)
    unet_config, unet_params = _unet(cfg, workdir, pictures, words, clip, vae, mesh)
    weights.save_model_folder(
        workdir / "emoji-sd" / "unet", unet_config, unet_params, dtype=STORED
    )
    logging.info("wrote %s", workdir / "emoji-sd")


def _optimizer(stage) -> optax.GradientTransformation:
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, stage.lr, max(1, stage.steps // 20), stage.steps, stage.lr / 50
    )
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(schedule, b2=0.99, weight_decay=stage.weight_decay),
    )


def _train(name, cfg, workdir, mesh, params, make_step, source, frozen=None):
    """Trains one stage; returns its averaged parameters on the host."""
    stage = cfg[name]
    tx = _optimizer(stage)
    state = init_state(params, {name: tx.init(params)}, ema=True)
    batches = loop.Batches({"train": pipeline.batches(source, stage.batch, cfg.seed)})
    key = jax.random.fold_in(jax.random.key(cfg.seed), STAGES.index(name))
    state = loop.run(
        sharding.replicate(mesh, state),
        make_step(tx),
        sharding.replicate(mesh, frozen or {}),
        batches,
        sharding.replicate(mesh, key),
        options=loop.Options(
            steps=stage.steps,
            log_every=cfg.log_every,
            checkpoint_every=cfg.checkpoint_every,
            name=name,
        ),
        workdir=workdir / name,
        place=lambda batch: sharding.put_batch(mesh, batch),
    )
    return jax.device_get(state.ema)


def _tokenizer(cfg, workdir, pictures):
    from transformers import CLIPTokenizerFast

    folder = workdir / "emoji-sd" / "tokenizer"
    if not (folder / "tokenizer_config.json").exists():
        every = (
            captions.fill(t, c, s)
            for c in pictures.concepts
            for s in pictures.styles
            for t in captions.TEMPLATES
        )
        size = tokenizer_stage.write(folder, every, cfg.clip.tokens)
        logging.info("tokenizer of %d tokens", size)
    return CLIPTokenizerFast.from_pretrained(folder)


def _source(pictures, keep):
    """The pictures of `keep` (bool "N") as Grain reads them, with their labels."""
    may_flip = np.asarray([captions.may_flip(c) for c in pictures.concepts])
    return pipeline.ArraySource(
        {
            "image": pictures.images[keep],
            "concept": pictures.concept_ids[keep],
            "style": pictures.style_ids[keep],
            "may_flip": may_flip[pictures.concept_ids[keep]],
        }
    )


def _clip(cfg, workdir, pictures, words, mesh):
    model_config = clip_stage.model_config(cfg.clip, len(words))
    model = vision.build_clip(model_config)

    tables = clip_stage.caption_tables(
        words, pictures.concepts, pictures.styles, cfg.clip.tokens
    )
    init = functools.partial(
        clip_stage.init_params, model, len(pictures.concepts), len(pictures.styles)
    )
    params = _train(
        "clip",
        cfg,
        workdir,
        mesh,
        jax.jit(init)(jax.random.key(cfg.seed)),
        lambda tx: clip_stage.make_step(model, tx, cfg.clip),
        _source(pictures, ~pictures.held_out),
        {"captions": tables},
    )["clip"]
    return model_config, params


def _vae(cfg, workdir, pictures, mesh):
    model_config = vae_stage.model_config(cfg.vae)
    model = sd.build_vae(model_config)

    def init(key):
        names = dict(
            zip(
                ("params", "dropout", "gaussian"), jax.random.split(key, 3), strict=True
            )
        )
        return model.init(names, jnp.zeros((1, 3, 64, 64)))["params"]

    source = _source(pictures, ~pictures.held_out)
    params = _train(
        "vae",
        cfg,
        workdir,
        mesh,
        jax.jit(init)(jax.random.key(cfg.seed + 1)),
        lambda tx: vae_stage.make_step(model, tx, cfg.vae),
        source,
    )
    return {**model_config, "scaling_factor": _scale(model, params, pictures)}, params


def _decoder(cfg, workdir, pictures, vae, mesh):
    """Returns the VAE's parameters with its decoder trained on."""
    model_config, params = vae
    model = sd.build_vae(model_config)
    trained = {name: params[name] for name in ("decoder", "post_quant_conv")}
    frozen = {name: params[name] for name in params if name not in trained}
    trained = _train(
        "decoder",
        cfg,
        workdir,
        mesh,
        trained,
        lambda tx: vae_stage.make_decoder_step(model, tx, cfg.decoder),
        _source(pictures, ~pictures.held_out),
        {"encoder": frozen},
    )
    return {**params, **trained}


def _scale(model, params, pictures) -> float:
    """Returns 1 / standard deviation of the latents, to three digits."""

    @jax.jit
    def encode(params, x_BCHW):
        return sd.apply_vae_encode(model, params, x_BCHW)[0]

    rows = np.flatnonzero(~pictures.held_out)[::7]
    x_BHWC = jnp.asarray(pictures.images[rows], jnp.float32) / 127.5 - 1.0
    mean = encode(params, jnp.transpose(x_BHWC, (0, 3, 1, 2)))
    return float(f"{1.0 / float(jnp.std(mean)):.3g}")


def _unet(cfg, workdir, pictures, words, clip, vae, mesh):
    (clip_config, clip_params), (vae_config, vae_params) = clip, vae
    size = 64 // 2 ** (len(cfg.vae.channels) - 1)
    model_config = unet_stage.model_config(
        cfg.unet, cfg.vae.latent_channels, size, cfg.clip.text_width
    )
    model = sd.build_unet(model_config)
    encoder = sd.build_vae(vae_config)

    def encode(x_BHWC):
        x_BCHW = jnp.transpose(x_BHWC, (0, 3, 1, 2))
        mean, logvar = sd.apply_vae_encode(encoder, vae_params, x_BCHW)
        scale = vae_config["scaling_factor"]
        return scale * mean, scale * jnp.exp(0.5 * logvar)

    known = np.asarray([c in emoji.known_concepts() for c in pictures.concepts])
    rows = np.flatnonzero(known[pictures.concept_ids] & ~pictures.held_out)
    latents = unet_stage.augmented_latents(
        jax.random.key(cfg.seed + 2), encode, pictures, rows, cfg.unet
    )
    source = pipeline.ArraySource(
        {**latents, "caption": np.arange(len(rows), dtype=np.int32)}
    )
    text, empty = _text_states(cfg, clip_config, clip_params, words, pictures, rows)

    def init(key):
        z = jnp.zeros((1, cfg.vae.latent_channels, size, size))
        names = dict(zip(("params", "dropout"), jax.random.split(key), strict=True))
        return model.init(names, z, jnp.zeros(1, jnp.int32), empty[None])["params"]

    params = _train(
        "unet",
        cfg,
        workdir,
        mesh,
        jax.jit(init)(jax.random.key(cfg.seed + 3)),
        lambda tx: unet_stage.make_step(model, tx, cfg.unet),
        source,
        {"text": text, "empty": empty, "abar": unet_stage.alphas_cumprod()},
    )
    return model_config, params


def _text_states(cfg, clip_config, clip_params, words, pictures, rows):
    """Returns float32 "V N L D" for every row in every template, and "L D" for ""."""
    tower = sd.build_text(clip_config["text_config"])
    params = {"text_model": clip_params["text_model"]}
    encode = jax.jit(lambda p, ids: sd.apply_text(tower, p, ids)[0])

    def states(texts):
        ids = words(
            texts, padding="max_length", truncation=True, max_length=cfg.clip.tokens
        ).input_ids
        return np.asarray(encode(params, np.asarray(ids, np.int32)))

    names = [
        (
            pictures.concepts[pictures.concept_ids[r]],
            pictures.styles[pictures.style_ids[r]],
        )
        for r in rows
    ]
    text = [states([captions.fill(t, *n) for n in names]) for t in captions.TEMPLATES]
    return np.stack(text), states([""])[0]


def _write_base(workdir, clip_config, clip_params, vae_config, vae_params) -> None:
    """Writes all of the diffusers folder but the UNet, and the judge beside it."""
    folder = workdir / "emoji-sd"
    text_config = {
        "architectures": ["CLIPTextModel"],
        "torch_dtype": STORED,
        **clip_config["text_config"],
    }
    text_params = {"text_model": clip_params["text_model"]}
    weights.save_model_folder(
        folder / "text_encoder", text_config, text_params, dtype=STORED
    )
    weights.save_model_folder(folder / "vae", vae_config, vae_params, dtype=STORED)
    weights.save_model_folder(workdir / "judge", clip_config, clip_params, dtype=STORED)
    for file in (folder / "tokenizer").iterdir():  # the judge stands alone
        shutil.copy(file, workdir / "judge" / file.name)
    (folder / "scheduler").mkdir(exist_ok=True)
    (folder / "scheduler" / "scheduler_config.json").write_text(
        json.dumps(unet_stage.scheduler_config(), indent=2) + "\n"
    )
    index = {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": "0.35.0",
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
