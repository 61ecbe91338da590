# SPDX-License-Identifier: Apache-2.0
"""What every defense promises, by its name or a stranger's path, on the toy model."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_denoiser
from flax.traverse_util import flatten_dict, unflatten_dict

from gift_jax import train
from gift_jax.data.cache import cached_source
from gift_jax.data.pairs import Pairs
from gift_jax.defenses import base
from gift_jax.runtime.errors import UserError
from gift_jax.state import init_state
from gift_jax.training import setup, sharding

STRANGER = "stranger_defenses.shrink"
STRANGERS_MODULE = '''
"""Draws the trainable parameters towards 0: a defense from outside the package."""

import dataclasses

from gift_jax.defenses import base
from gift_jax.runtime import config
from gift_jax.state import make_descent


@dataclasses.dataclass(frozen=True)
class Shrink:
    weight: float = config.number(1.0, low=0, doc="of the sum of squares")


def plan(task):
    parts, tx = task.model.split(task.run.trainable), task.optimizer("upper")

    def loss(params, frozen, batch, key):
        value = sum((a**2).sum() for a in params.values()) * task.settings.weight
        return value, {"upper/loss": value}

    return base.Plan(
        step=make_descent("upper", loss, tx),
        params=parts.trainable,
        frozen={"network": parts.frozen},
        opt={"upper": tx.init(parts.trainable)},
        sizes={"harmful": task.batch_size("harmful")},
        exported=tuple(parts.trainable),
    )


DEFENSE = base.Defense(
    config=Shrink, title="shrink", plan=plan, groups=("harmful",), optimizers=("upper",)
)
'''
# Beside the defaults: rates at which the toy moves, and trajectories of its length.
FIELDS = {"lower.lr": 1e-3, "upper.lr": 1e-2, "harmful.batch": 4, "safe.batch": 4}
FIELDS |= {"steps": 3, "esd.steps": 5, "esd.trajectories": 4, "checkpoints.every": 1}
FIELDS |= {"samples.num": 0, "gift_adversarial.attacker.restart_every": 10**6}
POST_FINETUNE = "gift_adversarial.post_finetune"
FIELDS |= {f"{POST_FINETUNE}.steps": 2, f"{POST_FINETUNE}.lr": 1e-2}
FIELDS |= {"gift_gate.preserve_steps": 2}
PHASES = {"gift_adversarial": "post_finetune", "gift_gate": "preserve"}  # that follow
# What the steps of a defense promise to drive, see `progress`: up or down.
PROMISES = dict.fromkeys(base.NAMES, ("harmful_loss", 1)) | {
    "esd": ("esd/loss", -1),
    "gift_gate": ("upper/loss", -1),
    STRANGER: ("upper/loss", -1),
}


def pairs(word, seed):
    """Eight random images of one thing."""
    images = np.random.default_rng(seed).integers(0, 256, (8, 2, 2, 3), np.uint8)
    one = [word] * 8
    return Pairs(images, [f"a {word}"] * 8, one, [""] * 8, np.ones(8, bool))


@dataclasses.dataclass(frozen=True)
class Case:
    """A defense with its task; plan: None for one in closed form.

    step: its plan's, jitted without donation, so that a case compiles once.
    """

    name: str
    defense: base.Defense
    task: base.Task
    plan: base.Plan | None
    step: Any = None

    def state(self):
        return init_state(self.plan.params, self.plan.opt)

    def batches(self):
        sources = {g: (self.task.sources | self.plan.sources)[g] for g in self.sizes}
        return setup.make_batches(sources, self.sizes, seed=0, role="defense")

    @property
    def sizes(self):
        return self.plan.sizes

    @property
    def args(self):
        """(state, frozen, batch, key) of the first step."""
        return self.state(), self.plan.frozen, next(self.batches()), jax.random.key(3)


@functools.cache
def make_case(name, noise="epsilon"):
    """The case of a defense's config, checked as the command does."""
    cfg = train.get_config(name)
    fields = {
        field: value for field, value in FIELDS.items() if field.split(".")[0] in cfg
    }
    cfg.update_from_flattened_dict(fields)
    for group in ("harmful", "safe"):
        if group in cfg:
            cfg[group].names = ("bomb",)
    if name == "gift_gate":
        cfg.upper.lr = 0.1  # of a detector of four weights
    run, defense = train.resolve(cfg), base.load(name)
    model = toy_denoiser.model(noise)
    words = {"harmful": "bomb", "safe": "cat"}
    data = {group: pairs(words[group], seed=len(group)) for group in run.data}
    task = base.Task(run.settings, run, model, data, sources={})
    if defense.edit:
        return Case(name, defense, task, None)
    sources = {
        group: cached_source(model, data[group], run.data[group], task.key(group))
        for group in data
    }
    task = dataclasses.replace(task, sources=sources)
    plan = defense.plan(task)
    return Case(name, defense, task, plan, jax.jit(plan.step))


@pytest.fixture(scope="module", autouse=True)
def stranger(tmp_path_factory):
    """A module outside the package, importable by its dotted path."""
    root = tmp_path_factory.mktemp("strangers")
    (root / "stranger_defenses").mkdir()
    (root / "stranger_defenses" / "shrink.py").write_text(STRANGERS_MODULE)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(root)
        yield


IN_STEPS = [name for name in base.NAMES if base.load(name).plan] + [STRANGER]


@pytest.fixture(params=[*base.NAMES, STRANGER])
def case(request):
    return make_case(request.param)


@pytest.fixture(params=IN_STEPS)
def stepping(request):
    return make_case(request.param)


@pytest.fixture(params=["epsilon", "flow"])
def noise(request):
    """A noise process; that of a model of another family, too."""
    return request.param


@pytest.fixture(params=IN_STEPS)
def on_both(request, noise):
    return make_case(request.param, noise)


def assert_identical(a, b):
    a, b = jax.device_get((a, b))
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def differ(a, b):
    return any((np.asarray(a[path]) != np.asarray(b[path])).any() for path in a)


# --- the registry ---------------------------------------------------------------------


def test_every_name_has_a_title_and_a_config(case):
    defense = base.load(case.name)
    assert isinstance(defense, base.Defense) and defense.title
    assert (defense.plan is None) != (defense.edit is None)
    assert case.name.rpartition(".")[2] in train.get_config(case.name)
    assert {"harmful"} <= set(defense.groups) <= {"harmful", "safe"}
    assert defense.steps(case.task.run)


def test_unknown_name_is_one_line_that_lists_the_choices():
    for name in ("gfit", "", "nowhere.at_all", "gift_jax.state"):
        with pytest.raises(UserError, match="config.method=") as error:
            base.load(name)
        assert all(known in str(error.value) for known in base.NAMES)
        assert "\n" not in str(error.value)


# --- the step -------------------------------------------------------------------------


def test_step_is_pure_and_compiles_once(stepping):
    case, args = stepping, stepping.args
    kept = jax.device_get((args[:3], jax.random.key_data(args[3])))
    first = case.step(*args)
    assert_identical(first, case.step(*args))
    assert_identical(kept, (args[:3], jax.random.key_data(args[3])))
    state, metrics = first
    assert int(state.step) == 1 and differ(state.params, case.plan.params)
    assert all(value.shape == () for value in metrics.values())
    assert all(np.isfinite(list(jax.device_get(metrics).values())))
    later = case.step(state, *args[1:])  # with other noise
    assert set(later[1]) == set(metrics)
    assert case.step._cache_size() == 1


def test_step_draws_by_its_key_and_its_number(stepping):
    state, *rest, key = stepping.args
    results = [
        stepping.step(state.replace(step=jnp.int32(number)), *rest, k)[0].params
        for number, k in ((0, key), (0, jax.random.key(4)), (1, key))
    ]
    draws = stepping.name != STRANGER
    assert [differ(results[0], other) for other in results[1:]] == [draws, draws]


def test_parameters_and_frozen_ones_make_the_network(on_both):
    plan, model = on_both.plan, on_both.task.model
    network = set(flatten_dict(model.denoiser_params, sep="/"))
    own = {path for path in plan.params if path in network}
    assert own | set(plan.frozen["network"]) == network
    assert not own & set(plan.frozen["network"])
    assert {a.dtype for a in plan.params.values()} == {jnp.dtype(jnp.float32)}


# --- what comes of a run --------------------------------------------------------------


def test_export_is_the_trainable_set(case):
    model, run = case.task.model, case.task.run
    if case.plan is None:
        changed = case.defense.edit(case.task)
        paths = model.split("cross_attention_kv").trainable
        assert set(changed) == set(paths) and differ(changed, paths)
        return
    paths, plan = tuple(model.split(run.trainable).trainable), case.plan
    while plan.then:
        plan = plan.then({path: plan.params[path] for path in plan.exported})
    assert set(plan.exported) == set(paths)
    assert set(case.defense.exported(plan.params, paths)) == set(paths)


def progress(case, params, metric):
    """A metric of parameters: of the first step's noise, or the mean loss of pairs."""
    if metric != "harmful_loss":
        state = case.state().replace(params=params)
        return float(case.step(state, *case.args[1:])[1][metric])
    model = case.task.model
    network = flatten_dict(model.denoiser_params, sep="/")
    network |= {path: a for path, a in params.items() if path in network}
    batch = case.task.sources["harmful"].take(np.arange(8))
    keys = jax.random.split(jax.random.key(9), 16)
    losses = losses_of(model.denoiser)(unflatten_dict(network, sep="/"), batch, keys)
    return float(jnp.mean(losses))


@functools.cache
def losses_of(denoiser):
    """(network, batch, keys) -> the losses with each key, jitted."""

    def losses(network, batch, keys):
        return jax.vmap(lambda key: denoiser.losses(network, batch, key)[0])(keys)

    return jax.jit(losses)


def test_steps_go_where_the_defense_promises(on_both):
    case, (metric, sign) = on_both, PROMISES[on_both.name]
    state, frozen, _, key = case.args
    batches, before = case.batches(), progress(case, state.params, metric)
    for _ in range(20):
        state, _ = case.step(state, frozen, next(batches), key)
    params = {path: state.params[path] for path in case.plan.exported}
    after = progress(case, {**case.plan.params, **params}, metric)
    print(f"{case.name}: {metric} {before:.4f} -> {after:.4f}")
    assert sign * (after - before) > 0.02 * before


def test_resumed_run_is_a_straight_one(stepping, tmp_path):
    plan, run = stepping.plan, stepping.task.run
    mesh = sharding.make_mesh(jax.devices()[:1])

    def take(folder, steps):
        return setup.run_loop(
            dataclasses.replace(run, steps=steps),
            mesh,
            jax.tree.map(jnp.array, stepping.state()),
            stepping.step,
            plan.frozen,
            stepping.batches(),
            folder,
            "defense",
            rules=stepping.task.model.partition_rules,
            name=plan.name,
        )

    straight = take(tmp_path / "straight", 3)
    halfway = take(tmp_path / "resumed", 1)
    resumed = take(tmp_path / "resumed", 3)
    assert differ(halfway.params, resumed.params)
    assert_identical(straight, resumed)


def test_phase_that_follows_trains_what_is_exported(stepping):
    plan, task = stepping.plan, stepping.task
    assert (plan.then is not None) == (stepping.name in PHASES)
    if plan.then is None:
        return
    moved = {path: 1.1 * plan.params[path] for path in plan.exported}
    then = plan.then(moved)
    assert (then.name, then.steps) == (PHASES[stepping.name], 2)
    sources = {group: task.sources[group] for group in then.sizes}
    batches = setup.make_batches(sources, then.sizes, seed=0, role=then.name)
    step, state = jax.jit(then.step), init_state(then.params, then.opt)
    args = then.frozen, next(batches), jax.random.key(5)
    losses = []
    for _ in range(20):  # always with the first step's noise
        new, metrics = step(state, *args)
        state = new.replace(step=state.step)
        losses.append(float(metrics["lower/loss"]))
    assert set(state.params) == set(then.exported)
    assert losses[-1] < 0.9 * losses[0]
