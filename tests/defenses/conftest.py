# SPDX-License-Identifier: Apache-2.0
"""A GIFT step on the toy denoiser, and the tiny Stable Diffusion's UNet."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy_denoiser

from gift_jax.defenses import gift
from gift_jax.models.trainable import select_trainable
from gift_jax.state import init_state


@dataclasses.dataclass(frozen=True)
class Setup:
    """All that a step takes."""

    denoiser: object
    params: dict
    frozen: dict
    batch: dict

    @property
    def network(self):
        """Every parameter of the network, flat."""
        return {**self.frozen["network"], **self.params}

    def state(self, tx_lower, tx_upper):
        """A fresh copy at step 0, which a step may be given to keep."""
        params = jax.tree.map(jnp.array, self.params)
        opt = {"lower": tx_lower.init(params), "upper": tx_upper.init(params)}
        return init_state(params, opt)

    def step(self, lower=None, upper=None, **settings):
        """Returns (state, jitted step), with SGD where no optimizer is given."""
        lower, upper = lower or optax.sgd(0.1), upper or optax.sgd(0.1)
        step = gift.make_step(self.denoiser, gift.Gift(**settings), lower, upper)
        return self.state(lower, upper), jax.jit(step)


def make_toy(dtype=np.float32, count=4):
    """The toy, cross-attention trainable; `count` pairs a level."""
    trainable, frozen = select_trainable(toy_denoiser.params(dtype), "cross_attention")
    return Setup(
        toy_denoiser.denoiser(),
        trainable,
        {"network": frozen},
        {
            "safe": toy_denoiser.batch(count, dtype, 0),
            "harmful": toy_denoiser.batch(count, dtype, 1),
        },
    )


@pytest.fixture
def toy():
    return make_toy()


@pytest.fixture(scope="session")
def toy_factory():
    return make_toy


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="session")
def tiny_setup(tiny):
    """The tiny UNet, cross-attention trainable, two random pairs a level."""
    parts = tiny.split("cross_attention")
    rng = np.random.default_rng(5)

    def pairs():
        return {
            "mean": rng.normal(size=(2, 4, 8, 8)).astype(np.float32),
            "std": rng.uniform(0.01, 0.1, size=(2, 4, 8, 8)).astype(np.float32),
            "cond": {"states": rng.normal(size=(2, 16, 32)).astype(np.float32)},
        }

    frozen = {"network": parts.frozen}
    batch = {"safe": pairs(), "harmful": pairs()}
    return Setup(tiny.denoiser, parts.trainable, frozen, batch)
