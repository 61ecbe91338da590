# SPDX-License-Identifier: Apache-2.0
"""What every attack promises, by its name or a stranger's path, on the toy model."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_denoiser
from flax.traverse_util import flatten_dict

from gift_jax import attack as command
from gift_jax.attacks import base
from gift_jax.data.cache import cached_source
from gift_jax.data.pairs import Pairs
from gift_jax.models import load
from gift_jax.models.weights import TOKEN_TABLE
from gift_jax.runtime.errors import UserError
from gift_jax.state import init_state
from gift_jax.training import setup, sharding

STRANGER = "stranger_attacks.keys"
STRANGERS_MODULE = '''
"""Fine-tunes the cross-attention's keys: an attack from outside the package."""

import dataclasses

import jax.numpy as jnp

from gift_jax.attacks import base
from gift_jax.state import make_descent, merge_params


@dataclasses.dataclass(frozen=True)
class Keys:
    """No fields."""


def plan(task):
    parts, denoiser = task.model.split("cross_attention"), task.model.denoiser
    keys = {path: a for path, a in parts.trainable.items() if "/to_k/" in path}
    rest = {path: a for path, a in parts.trainable.items() if path not in keys}

    def loss(params, frozen, batch, key):
        network = merge_params(params, frozen["network"])
        value = jnp.mean(denoiser.losses(network, batch["data"], key)[0])
        return value, {"attack/loss": value}

    step = make_descent("attack", loss, task.tx, task.micro_batches)
    return base.Plan(task.model, step, keys, {"network": {**parts.frozen, **rest}})


ATTACK = base.Attack(
    config=Keys, title="keys", plan=plan, changed=lambda s, folder, params: dict(params)
)
'''
# Beside the defaults: the toy's words, and rates at which it learns.
FIELDS = {"steps": 3, "checkpoints.every": 1, "samples.num": 0, "data.batch": 4}
FIELDS |= {"optimizer.lr": 1e-2, "optimizer.weight_decay": 0.0}
VARIANTS = {  # name: (attack, overrides, paths that change)
    "lora": ("lora", {"lora.rank": 2}, "/attn"),
    "dreambooth": ("dreambooth", {}, ""),
    "dreambooth_prior": ("dreambooth", {"dreambooth.prior_weight": 0.5}, ""),
    "dreambooth_text": ("dreambooth", {"dreambooth.train_text_encoder": True}, ""),
    "textual_inversion": ("textual_inversion", {}, TOKEN_TABLE),
    "retain_then_teach": (
        "retain_then_teach",
        {"retain_then_teach.retain_steps": 2},
        "",
    ),
    "transplant": ("transplant", {"transplant.rank": 2}, "/attn"),
    STRANGER: (STRANGER, {}, "/to_k/"),
}


def pairs(word, seed):
    """Eight random images of one thing."""
    images = np.random.default_rng(seed).integers(0, 256, (8, 2, 2, 3), np.uint8)
    one = [word] * 8
    return Pairs(images, [f"a {word}"] * 8, one, [""] * 8, np.ones(8, bool))


@dataclasses.dataclass(frozen=True)
class Case:
    """An attack with its task. step: its plan's, jitted without donation."""

    variant: str
    attack: base.Attack
    task: base.Task
    plan: base.Plan
    sources: dict
    step: Any

    def state(self):
        opt = {"attack": self.task.tx.init(self.plan.params)}
        return init_state(self.plan.params, opt)

    def batches(self):
        sizes = dict.fromkeys(self.sources, 4)
        return setup.make_batches(self.sources, sizes, seed=0, role="attack")

    @property
    def args(self):
        """(state, frozen, batch, key) of the first step."""
        return self.state(), self.plan.frozen, next(self.batches()), jax.random.key(3)

    def changed(self, params):
        """The attacked model's tensors that differ, flat."""
        folder, params = self.task.model.folder, jax.device_get(params)
        return self.attack.changed(self.task.settings, folder, params)


@functools.cache
def make_case(variant, noise="epsilon"):
    """The case of an attack's config, checked as the command does."""
    name, overrides, _ = VARIANTS[variant]
    cfg = command.get_config(name)
    cfg.update_from_flattened_dict(FIELDS | overrides)
    for group in ("data", "prior", "retain"):
        if group in cfg:
            cfg[group].update(names=("bomb",), batch=4)
    run, attack = command.resolve(cfg), base.load(name)
    model = toy_denoiser.model(noise)
    task = base.Task(run.settings, run, model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(load, "load_model", lambda *a, **how: toy_denoiser.model(noise))
        plan = attack.plan(task)
    words = {"data": "<thing>" if name == "textual_inversion" else "bomb"}
    data = {g: pairs(words.get(g, "thing"), seed=len(g)) for g in run.data}
    attack.check_prompts(run.settings, data["data"].prompts)
    sources = {
        group: cached_source(
            plan.model, data[group], spec, task.key(group), ids=plan.reads_ids
        )
        for group, spec in run.data.items()
    }
    return Case(variant, attack, task, plan, sources, jax.jit(plan.step))


@pytest.fixture(scope="module", autouse=True)
def stranger(tmp_path_factory):
    """A module outside the package, importable by its dotted path."""
    root = tmp_path_factory.mktemp("strangers")
    (root / "stranger_attacks").mkdir()
    (root / "stranger_attacks" / "keys.py").write_text(STRANGERS_MODULE)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(root)
        yield


@pytest.fixture(params=VARIANTS)
def case(request):
    return make_case(request.param)


@pytest.fixture(params=["epsilon", "flow"])
def noise(request):
    """A noise process; that of a model of another family, too."""
    return request.param


@pytest.fixture(params=VARIANTS)
def on_both(request, noise):
    return make_case(request.param, noise)


def assert_identical(a, b):
    a, b = jax.device_get((a, b))
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def differ(a, b):
    a, b = jax.tree.leaves(jax.device_get(a)), jax.tree.leaves(jax.device_get(b))
    return any((x != y).any() for x, y in zip(a, b, strict=True))


# --- the registry ---------------------------------------------------------------------


def test_every_name_has_a_case_and_a_title(case):
    with_steps = {name for name in base.NAMES if base.load(name).plan}
    assert {name for name, *_ in VARIANTS.values()} == {*with_steps, STRANGER}
    assert {"edit_back", "interpolation"} == {*base.NAMES} - with_steps
    s = case.task.settings
    assert case.attack.title and case.attack.trained(s)
    assert "data" in case.attack.reads(s)
    assert set(case.attack.reads(s)) <= set(case.attack.groups)


def test_unknown_name_is_one_line_that_lists_the_choices():
    for name in ("lorra", "", "nowhere.at_all", "gift_jax.state"):
        with pytest.raises(UserError, match="config.attack=") as error:
            base.load(name)
        assert all(known in str(error.value) for known in base.NAMES)
        assert "\n" not in str(error.value)


# --- the step -------------------------------------------------------------------------


def test_step_is_pure_and_compiles_once(case):
    args = case.args
    kept = jax.device_get((args[:3], jax.random.key_data(args[3])))
    first = case.step(*args)
    assert_identical(first, case.step(*args))
    assert_identical(kept, (args[:3], jax.random.key_data(args[3])))
    state, metrics = first
    assert int(state.step) == 1 and differ(state.params, case.plan.params)
    assert {"attack/loss", "attack/grad_norm"} <= set(metrics)
    assert all(value.shape == () for value in metrics.values())
    assert all(np.isfinite(list(jax.device_get(metrics).values())))
    later = case.step(state, *args[1:])  # with other noise
    assert set(later[1]) == set(metrics)
    assert case.step._cache_size() == 1


def test_step_draws_by_its_key_and_its_number(case):
    state, *rest, key = case.args
    losses = {
        float(
            case.step(state.replace(step=jnp.int32(number)), *rest, k)[1]["attack/loss"]
        )
        for number, k in ((0, key), (0, jax.random.key(4)), (1, key))
    }
    assert len(losses) == 3


def test_steps_lower_the_loss(on_both):
    case = on_both

    def loss(state):
        """Of the first batch, the mean over the noise of four steps."""
        start, *args = case.args
        numbered = [
            start.replace(step=jnp.int32(number), params=state.params)
            for number in range(100, 104)
        ]
        return np.mean([case.step(s, *args)[1]["attack/loss"] for s in numbered])

    state, frozen, _, key = case.args
    batches, before = case.batches(), loss(state)
    for _ in range(40):
        state, _ = case.step(state, frozen, next(batches), key)
    print(f"{case.variant}: attack/loss {before:.4f} -> {loss(state):.4f}")
    assert loss(state) < 0.98 * before


# --- what comes of a run --------------------------------------------------------------


def test_export_is_what_the_attack_trains(on_both):
    """The rest of the model's tensors are none of an attack's business."""
    case = on_both
    state, _ = case.step(*case.args)
    changed, model = case.changed(state.params), case.task.model
    flat = {}
    for component in model.params:
        flat |= flatten_dict(model.params[component], sep="/")
    part = VARIANTS[case.variant][2]
    expected = {path for path in flat if part in path}
    if case.variant in ("dreambooth", "dreambooth_prior", "retain_then_teach"):
        expected.remove(TOKEN_TABLE)
    assert set(changed) == expected
    for path, array in changed.items():
        before = flat[path]
        assert differ(array[: len(before)], before) or len(array) > len(before), path


def test_resumed_run_is_a_straight_one(case, tmp_path):
    mesh = sharding.make_mesh(jax.devices()[:1])

    def take(folder, steps):
        return setup.run_loop(
            dataclasses.replace(case.task.run, steps=steps),
            mesh,
            jax.tree.map(jnp.array, case.state()),
            case.step,
            case.plan.frozen,
            case.batches(),
            folder,
            "attack",
            rules=case.task.model.partition_rules,
            name=case.variant,
        )

    straight = take(tmp_path / "straight", 3)
    halfway = take(tmp_path / "resumed", 1)
    resumed = take(tmp_path / "resumed", 3)
    assert differ(halfway.params, resumed.params)
    assert_identical(straight, resumed)
