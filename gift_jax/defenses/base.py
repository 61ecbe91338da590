# SPDX-License-Identifier: Apache-2.0
"""From a config to what the loop runs: one plan a method of `gift_jax.train`."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging
from flax.traverse_util import flatten_dict

from gift_jax.attacks import lora
from gift_jax.data import captions, pipeline
from gift_jax.defenses import adversary, esd, gift, imma, objectives, uce
from gift_jax.models import hooks
from gift_jax.models.load import float32_unet, make_denoiser, split_unet
from gift_jax.models.sd import stable_diffusion
from gift_jax.models.trainable import select_trainable
from gift_jax.runtime.errors import UserError, above, at_least, choice, shown
from gift_jax.state import Step, run_key
from gift_jax.training.optimizer import make_optimizer

LEVELS = ("lower", "upper")
_MAX_LISTED = 16  # concepts with a line of their own in the metrics


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a method makes of a model.

    Attributes: step: of the loop's contract. params: what trains, flat, float32.
      frozen: the UNet's other parameters, flat, in the compute dtype. opt: the
      optimisers' states. sizes: pairs a step of each data group. psi: paths of `params`
      that are exported. sources: what takes the place of a group's cached pairs.
      also_frozen: what else the step reads.
    """

    step: Step
    params: dict[str, jax.Array]
    frozen: dict[str, jax.Array]
    opt: dict[str, Any]
    sizes: dict[str, int]
    psi: tuple[str, ...]
    sources: dict[str, Any] = dataclasses.field(default_factory=dict)
    also_frozen: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Defense:
    """A defence.

    Attributes: groups: of data that it reads. check: cfg -> its settings, before the
      model is loaded. plan: (cfg, settings, model, pairs, cached sources) -> Plan; or
      edit: (cfg, settings, model, pairs) -> the changed parameters, flat, at once.
    """

    groups: tuple[str, ...]
    check: Callable
    plan: Callable | None = None
    edit: Callable | None = None


def check_gift(cfg) -> gift.Settings:
    """Returns GIFT's settings, every field checked; UserError names the field."""
    g = cfg.gift
    choice("config.gift.gradient", g.gradient, gift.GRADIENTS)
    choice("config.gift.bound", g.bound, objectives.BOUNDS)
    choice("config.gift.noise_target", g.noise_target, objectives.NOISE_TARGETS)
    choice("config.gift.distance", g.distance, objectives.DISTANCES)
    choice("config.gift.preserve", g.preserve, gift.PRESERVE)
    if g.beta and not g.layers:
        raise UserError(
            "config.gift.layers is empty; name a kind of layer, or set "
            "--config.gift.beta=0"
        )
    for layer in g.layers:
        choice("config.gift.layers", layer, tuple(hooks.CAPTURE_KINDS))
    lows = {"inner_steps": 0, "outer_steps": 1, "beta": 0, "cap": 0}
    lows |= {"safe_limit": 0, "joint_weight": 0}
    for name, low in lows.items():
        at_least(f"config.gift.{name}", g[name], low)
    if g.safe_limit and (g.gradient != "first_order" or not g.inner_steps):
        raise UserError(
            f"config.gift.safe_limit={g.safe_limit} is for gift.gradient=first_order "
            "and at least one inner step; set --config.gift.safe_limit=0"
        )
    attack = check_adversary(cfg.adversary)
    if attack.kinds and attack.horizon and g.gradient != "first_order":
        raise UserError(
            f"config.adversary.horizon={attack.horizon} is for gift.gradient="
            f"first_order, not {g.gradient}; set --config.adversary.horizon=0"
        )
    if _is_unrolled(g, attack) and cfg.attention in ("flash", "cudnn"):
        raise UserError(
            f"config.attention={cfg.attention} has no second derivative, which an "
            "unrolled gradient needs; set --config.attention=auto"
        )
    if cfg.accumulate > 1 and (g.gradient != "first_order" or attack.kinds):
        raise UserError(
            f"config.accumulate={cfg.accumulate} is for gift.gradient=first_order and "
            "no adversary; set --config.accumulate=1"
        )
    others = {"attack": attack, "accumulate": cfg.accumulate, "concepts": ()}
    return _settings(gift.Settings, g, **others)


def check_maximize_prior(cfg) -> gift.Settings:
    """MIMA's outer loss (arXiv:2412.15320): GIFT without representation noising."""
    return dataclasses.replace(check_gift(cfg), beta=0.0)


def check_maximize(cfg) -> gift.Settings:
    """Ascent alone: neither noising nor a lower level."""
    return dataclasses.replace(
        check_gift(cfg),
        beta=0.0,
        inner_steps=0,
        gradient="first_order",
        safe_limit=0.0,
    )


def check_adversary(a) -> adversary.Settings:
    """Returns the simulated attacker's settings; UserError names the field."""
    for kind in a.kinds:
        choice("config.adversary.kinds", kind, adversary.KINDS)
    lows = {"steps_min": 0, "steps_max": 1, "lr_min": 1e-12, "lora_lr_min": 1e-12}
    lows |= {
        "lr_max": 1e-12,
        "lora_lr_max": 1e-12,
        "rank": 1,
        "safe_weight": 0,
        "horizon": 0,
    }
    for name, low in lows.items():
        at_least(f"config.adversary.{name}", a[name], low)
    for name in ("steps", "lr", "lora_lr"):
        low, high = f"{name}_min", f"{name}_max"
        if a[low] > a[high]:
            raise UserError(
                f"config.adversary.{low}={a[low]} must be at most {high}={a[high]}"
            )
    if a.horizon and (a.unrolled or tuple(a.kinds) != ("full",)):
        raise UserError(
            f"config.adversary.horizon={a.horizon} is for kinds=full, not unrolled; "
            "set --config.adversary.kinds=full, or horizon=0"
        )
    above("config.adversary.alpha", a.alpha, 0, a.rank)
    return _settings(adversary.Settings, a)


def plan_gift(cfg, s: gift.Settings, model, data, _) -> Plan:
    """Returns the plan of GIFT, `maximize_prior` or `maximize`."""
    s = dataclasses.replace(s, concepts=_listed(data["harmful"]))
    if _is_unrolled(s, s.attack):
        model = model.replace(kernels=model.kernels.twice_differentiable())
    parts = split_unet(model, cfg.trainable)
    tx = _optimizers(cfg, s)
    step = gift.make_step(make_denoiser(model), s, tx["lower"], tx["upper"])
    opt = {level: tx[level].init(parts.trainable) for level in LEVELS}
    if s.attack.kinds and s.attack.horizon:
        opt["attacker"] = adversary.init_attacker({**parts.frozen, **parts.trainable})
    sizes = {
        "harmful": cfg.harmful.batch * s.outer_steps,
        "safe": cfg.safe.batch * max(1, s.inner_steps),
    }
    also = {}
    if s.preserve == "model":  # a copy: the loop donates the model's own
        also["original"] = jax.tree.map(jnp.array, parts.trainable)
    psi = tuple(parts.trainable)
    return Plan(step, parts.trainable, parts.frozen, opt, sizes, psi, also_frozen=also)


def _is_unrolled(g, attack: adversary.Settings) -> bool:
    return g.gradient == "unrolled" or bool(attack.kinds and attack.unrolled)


def check_imma(cfg) -> imma.Settings:
    """Returns IMMA's settings, every field checked; UserError names the field."""
    m = cfg.imma
    choice("config.imma.lower", m.lower, imma.LOWER)
    choice("config.imma.bound", m.bound, objectives.BOUNDS)
    for name, low in (("inner_steps", 0), ("outer_steps", 1), ("cap", 0), ("rank", 1)):
        at_least(f"config.imma.{name}", m[name], low)
    few, many = sorted((max(1, m.inner_steps), m.outer_steps))
    if many % few:
        raise UserError(
            f"config.imma.inner_steps={m.inner_steps} and outer_steps={m.outer_steps} "
            "share their pairs: one must divide by the other"
        )
    above("config.imma.alpha", m.alpha, 0, m.rank)
    return _settings(imma.Settings, m, accumulate=cfg.accumulate, concepts=())


def plan_imma(cfg, s: imma.Settings, model, data, _) -> Plan:
    """Returns the plan of IMMA."""
    s = dataclasses.replace(s, concepts=_listed(data["harmful"]))
    flat = flatten_dict(model.params["unet"], sep="/")
    psi = tuple(select_trainable(flat, cfg.trainable)[0])
    wanted = flat if s.lower == "dreambooth" else psi
    # Copies: the loop donates them, and the model's own are still to be drawn with.
    params = jax.tree.map(jnp.array, float32_unet(model, wanted))
    frozen = {path: flat[path] for path in flat if path not in params}
    if s.lower == "lora":
        key = run_key(cfg, "defence/init")
        params |= imma.flat_factors(lora.init(key, flat, s.rank))
    tx = _optimizers(cfg, s)
    step = imma.make_step(make_denoiser(model), s, psi, tx["lower"], tx["upper"])
    parts = {"lower": imma.lower_part(params), "upper": psi}
    opt = {
        level: tx[level].init({name: params[name] for name in parts[level]})
        for level in LEVELS
    }
    sizes = {"harmful": cfg.harmful.batch * max(s.inner_steps, s.outer_steps)}
    return Plan(step, params, frozen, opt, sizes, psi)


def check_esd(cfg) -> esd.Settings:
    """Returns ESD's settings, every field checked; UserError names the field."""
    e = cfg.esd
    choice("config.esd.source", e.source, esd.SOURCES)
    choice("config.esd.timestep", e.timestep, esd.TIMESTEPS)
    for name, low in (("eta", 0), ("steps", 1), ("guidance", 1), ("trajectories", 1)):
        at_least(f"config.esd.{name}", e[name], low)
    if cfg.accumulate > 1:
        raise UserError(
            f"config.accumulate={cfg.accumulate} is not for method=esd; set "
            "--config.accumulate=1"
        )
    return _settings(esd.Settings, e)


def plan_esd(cfg, s: esd.Settings, model, data, sources) -> Plan:
    """Returns the plan of ESD on the prompts of the harmful pairs."""
    parts = split_unet(model, cfg.trainable)
    params = jax.tree.map(jnp.array, parts.trainable)  # the loop donates these
    tx = make_optimizer(cfg.upper, cfg.steps, "upper")
    empty = stable_diffusion.encode_prompts(model, [""])
    text = sources["harmful"].arrays["text"]
    source = {"text": text}
    if s.source == "frozen":
        prompts = np.unique(text.rows)
        told = np.resize(prompts, max(cfg.esd.trajectories, len(prompts)))
        told = pipeline.DeduplicatedArray(text.table, told)
        logging.info("walking %d trajectories of %d steps", len(told), s.steps)
        key = run_key(cfg, "defence/trajectories")
        walked = esd.trajectories(model, told, empty, key, s)
        rows = esd.rows(walked["z"])
        of = told.rows[rows.pop("trajectory")]
        source = rows | {"text": pipeline.DeduplicatedArray(text.table, of)}
    step = esd.make_step(
        make_denoiser(model), s, tx, model.scheduler_config, model.latent_shape
    )
    return Plan(
        step,
        params,
        parts.frozen,
        {"upper": tx.init(params)},
        {"harmful": cfg.harmful.batch},
        tuple(params),
        {"harmful": pipeline.ArraySource(source)},
        {"original": parts.trainable, "empty": empty},
    )


def check_uce(cfg) -> uce.Settings:
    """Returns UCE's settings, every field checked; UserError names the field."""
    u = cfg.uce
    choice("config.uce.states", u.states, ("last", "tail"))
    for name in ("erase", "preserve"):
        at_least(f"config.uce.{name}", u[name], 0)
    try:
        captions.fill(u.guide, "", "style")
    except ValueError as error:
        raise UserError(
            f"config.uce.guide={shown(u.guide)} may use only {{style}} and {{a_style}}"
        ) from error
    above("config.uce.lamb", u.lamb, 0, 0.5)
    return _settings(uce.Settings, u)


def edit_uce(cfg, s: uce.Settings, model, data) -> dict[str, jax.Array]:
    """Returns UCE's edit: the harmful prompts towards the guide, the safe ones kept."""

    def states(prompts):
        text = np.asarray(stable_diffusion.encode_prompts(model, prompts))
        return text, stable_diffusion.tokenize(model, prompts)

    end, bad = model.tokenizer.eos_token_id, data["harmful"]
    guides = [captions.fill(cfg.uce.guide, "", style) for style in bad.styles]
    pairs = list(dict.fromkeys(zip(bad.prompts, guides, strict=True)))
    erase, erase_ids = states([prompt for prompt, _ in pairs])
    guide, guide_ids = states([guide for _, guide in pairs])
    keep, keep_ids = states(list(dict.fromkeys(data["safe"].prompts)))
    if cfg.uce.states == "tail":
        erase, guide = uce.tail_states(erase, erase_ids, guide, guide_ids, end)
        keep = keep.reshape(-1, keep.shape[-1])
    else:
        erase = uce.last_states(erase, erase_ids, end)
        guide = uce.last_states(guide, guide_ids, end)
        keep = uce.last_states(keep, keep_ids, end)
    params = split_unet(model, "cross_attention_kv").trainable
    return uce.edit(params, erase, guide, keep, s)


def plan_finetune(cfg, model, params, *, preserve: str = "data"):
    """Returns (step, optimiser states) of fine-tuning on safe pairs.

    Args: preserve: as GIFT's.
    """
    tx = make_optimizer(cfg.post_finetune, cfg.post_finetune.steps, "post_finetune")
    settings = gift.Settings(preserve=preserve)
    loss = gift.make_lower_loss(make_denoiser(model), settings)
    update = gift.make_level("lower", loss, tx, cfg.accumulate)

    def finetune_step(state, frozen, batch, key):
        key = jax.random.fold_in(key, state.step)
        args = state.params, state.opt["lower"], frozen, batch["safe"], key
        params, opt, metrics = update(*args)
        state = state.replace(step=state.step + 1, params=params, opt={"lower": opt})
        return state, metrics

    return finetune_step, {"lower": tx.init(params)}


DEFENSES = {
    "gift": Defense(("harmful", "safe"), check_gift, plan_gift),
    "maximize_prior": Defense(("harmful", "safe"), check_maximize_prior, plan_gift),
    "maximize": Defense(("harmful", "safe"), check_maximize, plan_gift),
    "imma": Defense(("harmful",), check_imma, plan_imma),
    "esd": Defense(("harmful",), check_esd, plan_esd),
    "uce": Defense(("harmful", "safe"), check_uce, edit=edit_uce),
}


def _optimizers(cfg, s) -> dict[str, optax.GradientTransformation]:
    counts = {"lower": s.inner_steps, "upper": s.outer_steps}
    return {
        level: make_optimizer(cfg[level], cfg.steps * counts[level], level)
        for level in LEVELS
    }


def _listed(data) -> tuple[str, ...]:
    """Returns the names of the concepts, if they are few enough to log each."""
    names = data.concept_names
    return names if len(names) <= _MAX_LISTED else ()


def _settings(cls, group, **others):
    names = [f.name for f in dataclasses.fields(cls) if f.name not in others]
    return cls(**{name: group[name] for name in names}, **others)
