# SPDX-License-Identifier: Apache-2.0
"""From a config to what the loop runs: one plan an attack of `gift_jax.attack`."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax.traverse_util import flatten_dict, unflatten_dict

from gift_jax.attacks import dreambooth, lora, textual_inversion
from gift_jax.models import hooks, weights
from gift_jax.models.load import (
    float32_params,
    float32_unet,
    make_denoiser,
    make_text_encoder,
)
from gift_jax.models.sd import stable_diffusion
from gift_jax.runtime.errors import UserError, above, at_least
from gift_jax.state import Step, run_key
from gift_jax.training.optimizer import make_optimizer

Flat = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Plan:
    """What an attack makes of a model.

    Attributes: model: to read prompts and draw with: the attacked one, with new words
      where it gets some. step: of the loop's contract. params: what trains, float32.
      frozen: what else the step reads. changed: trained parameters, NumPy -> {Flax
      path: array}, the tensors of the attacked model. reads_ids: the step runs the text
      encoder. opt: the optimiser's states, set by `plan`. files: trained parameters ->
      {name in the run's folder: tensors}, for those who add the attack to the base
      model. tokenizer: with new words, or None.
    """

    model: stable_diffusion.StableDiffusion
    step: Step
    params: dict[str, Any]
    frozen: dict[str, Any]
    changed: Callable[[Any], Flat]
    reads_ids: bool = False
    opt: dict[str, Any] = dataclasses.field(default_factory=dict)
    files: Callable[[Any], dict[str, Flat]] = lambda params: {}
    tokenizer: Any = None


@dataclasses.dataclass(frozen=True)
class Attack:
    """An attack. check: cfg -> None, before the model is loaded. plan: (cfg, model, tx)
    -> Plan.
    """

    check: Callable
    plan: Callable


def check_lora(cfg) -> None:
    """Raises UserError naming the field."""
    lora.check(cfg.lora.rank, cfg.lora.targets)
    above("config.lora.alpha", cfg.lora.alpha, 0, cfg.lora.rank)


def plan_lora(cfg, model, tx) -> Plan:
    """Returns the plan of LoRA fine-tuning."""
    unet = flatten_dict(model.params["unet"], sep="/")
    k_init = run_key(cfg, "attack/init")
    factors = lora.init(k_init, unet, cfg.lora.rank, cfg.lora.targets)
    kernels = float32_unet(model, factors)
    scale = cfg.lora.alpha / cfg.lora.rank

    def files(factors):
        state = lora.torch_state(factors, scale)
        return {"lora/pytorch_lora_weights.safetensors": state}

    return Plan(
        model=model,
        step=lora.make_step(make_denoiser(model), tx, scale, cfg.accumulate),
        params=factors,
        frozen={"unet": unet | kernels, "abar": _abar(model)},
        changed=lambda factors: lora.apply(kernels, factors, scale),
        files=files,
    )


def check_dreambooth(cfg) -> None:
    """Raises UserError naming the field."""
    at_least("config.dreambooth.prior_weight", cfg.dreambooth.prior_weight, 0)


def plan_dreambooth(cfg, model, tx) -> Plan:
    """Returns the plan of DreamBooth.

    Its params may be the model's own arrays, which the loop donates: what is drawn
    afterwards is drawn with the trained ones.
    """
    of_text = cfg.dreambooth.train_text_encoder
    params = {}
    for component in ("unet", "text_encoder") if of_text else ("unet",):
        paths = flatten_dict(model.params[component], sep="/")
        params |= float32_params(model, component, paths)
    encode = make_text_encoder(model) if of_text else None
    weight = cfg.dreambooth.prior_weight
    return Plan(
        model=model,
        step=dreambooth.make_step(
            make_denoiser(model), tx, weight, encode, cfg.accumulate
        ),
        params=params,
        frozen={"abar": _abar(model)},
        changed=dict,
        reads_ids=of_text,
    )


def check_inversion(cfg) -> None:
    """Raises UserError naming the field."""
    i = cfg.inversion
    textual_inversion.check_token(i.token, i.vectors)
    source = cfg.data
    if source.caption_key or (source.folder and not source.prompt):
        return  # captions: seen when they are read
    field = "template" if source.names or source.label_key else "prompt"
    _check_has_token(f"config.data.{field}={source[field]!r}", source[field], i.token)


def check_prompts(cfg, data) -> None:
    """Raises UserError if a pair's prompt lacks the token that is to be learned."""
    if cfg.attack == "textual_inversion":
        for prompt in data.prompts:
            _check_has_token(f"config.data: {prompt!r}", prompt, cfg.inversion.token)


def plan_inversion(cfg, model, tx) -> Plan:
    """Returns the plan of textual inversion."""
    i = cfg.inversion
    table_VD = _token_table(model)
    word = textual_inversion.initializer_id(model.tokenizer, i.initializer)
    grown = with_tokens(model, i.token, i.vectors)
    text = flatten_dict(model.params["text_encoder"], sep="/")
    text[weights.TOKEN_TABLE] = table_VD

    def changed(params):
        return {weights.TOKEN_TABLE: np.concatenate([table_VD, params["embeddings"]])}

    def files(params):
        return {"learned_embeds.safetensors": {i.token: params["embeddings"]}}

    unet = flatten_dict(model.params["unet"], sep="/")
    return Plan(
        model=grown,
        step=textual_inversion.make_step(
            make_denoiser(model), make_text_encoder(grown), tx, cfg.accumulate
        ),
        params={"embeddings": textual_inversion.start(table_VD, word, i.vectors)},
        frozen={"unet": unet, "text": text, "abar": _abar(model)},
        changed=changed,
        reads_ids=True,
        files=files,
        tokenizer=grown.tokenizer,
    )


def with_tokens(model, token: str, vectors: int):
    """Returns the model with a tokenizer and text module that have new tokens.

    Its text parameters are still the old ones, as many rows short.
    """
    tokenizer = stable_diffusion.load_tokenizer(model.path / "tokenizer")
    textual_inversion.add_tokens(tokenizer, token, vectors)
    config = model.text_encoder.config.to_dict() | {"vocab_size": len(tokenizer)}
    module = hooks.build_text(config, model.text_encoder.dtype)
    return model.replace(tokenizer=tokenizer, text_encoder=module)


def _token_table(model) -> np.ndarray:
    """Returns the rows that the tokenizer uses, float32 "V D", as they are on disk."""
    table = float32_params(model, "text_encoder", (weights.TOKEN_TABLE,))[
        weights.TOKEN_TABLE
    ]
    used = len(model.tokenizer)
    if len(table) < used:
        raise UserError(
            f"{model.path}: the tokenizer has {used} tokens, but the text encoder "
            f"{len(table)} rows; they are of different models"
        )
    return np.asarray(table[:used])  # as transformers' resize_token_embeddings


def _check_has_token(said: str, prompt: str, token: str) -> None:
    if token not in prompt:
        raise UserError(
            f"{said} has no {token}, which config.inversion.token is to learn; write "
            f"it where the thing is named: 'a photo of {token}'"
        )


ATTACKS = {
    "lora": Attack(check_lora, plan_lora),
    "dreambooth": Attack(check_dreambooth, plan_dreambooth),
    "textual_inversion": Attack(check_inversion, plan_inversion),
}


def make_plan(cfg, model) -> Plan:
    """Returns the configured attack's plan."""
    tx = make_optimizer(cfg.optimizer, cfg.steps, "optimizer")
    result = ATTACKS[cfg.attack].plan(cfg, model, tx)
    count = sum(a.size for a in jax.tree.leaves(result.params))
    logging.info("%s: training %.3f M parameters", cfg.attack, count / 1e6)
    return dataclasses.replace(result, opt={"attack": tx.init(result.params)})


def attacked_model(model, changed: Flat):
    """Returns the model with tensors replaced, in its compute dtype, to draw with."""
    params = dict(model.params)
    for component, arrays in weights.by_component(changed).items():
        if arrays:
            flat = flatten_dict(params[component], sep="/")
            dtype = model.unet.dtype
            flat |= {path: jnp.asarray(a, dtype) for path, a in arrays.items()}
            params[component] = unflatten_dict(flat, sep="/")
    return model.replace(params=params)


def _abar(model) -> jax.Array:
    return stable_diffusion.noise_schedule(model)
