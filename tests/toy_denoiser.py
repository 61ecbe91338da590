# SPDX-License-Identifier: Apache-2.0
"""A denoiser of one cross-attention block: compiles in a blink, exact in float64."""

import jax
import jax.numpy as jnp
import numpy as np

from gift_jax.diffusion import Denoiser

T, C, SIDE, L, D, WIDTH = 10, 4, 2, 3, 5, 6
SHAPES = {
    "block/attn2/to_q/kernel": (C, WIDTH),
    "block/attn2/to_k/kernel": (D, WIDTH),
    "block/attn2/to_v/kernel": (D, WIDTH),
    "block/attn2/to_out_0/kernel": (WIDTH, C),
    "block/attn1/to_q/kernel": (C, C),
    "block/proj_in/kernel": (C, C),
}


def predict(params, z_BCHW, t_B, c_BLD, capture=()):
    """One block: cross-attention beside a projection, then tanh."""
    block = params["block"]
    kernel = {name: p["kernel"] for name, p in block["attn2"].items()}
    x_BND = z_BCHW.reshape(z_BCHW.shape[0], C, -1).swapaxes(1, 2)
    q = x_BND @ kernel["to_q"] @ jnp.eye(WIDTH, dtype=x_BND.dtype)
    k, v = c_BLD @ kernel["to_k"], c_BLD @ kernel["to_v"]
    attention = jax.nn.softmax(jnp.einsum("bnd,bld->bnl", q, k), axis=-1)
    h = attention @ v @ kernel["to_out_0"] + x_BND @ block["proj_in"]["kernel"]
    h = h + jnp.sin(x_BND @ block["attn1"]["to_q"]["kernel"])
    h_BND = jnp.tanh(h + t_B.reshape(-1, 1, 1) / T)
    out = h_BND.swapaxes(1, 2).reshape(z_BCHW.shape)
    return out, ({"block": h_BND} if "transformer" in capture else {})


def denoiser(prediction_type="epsilon"):
    return Denoiser(predict, prediction_type, T)


def params(dtype=np.float32, seed=0):
    """Flat parameters, path -> array."""
    rng = np.random.default_rng(seed)
    return {
        path: jnp.asarray(rng.normal(size=shape) * 0.5, dtype)
        for path, shape in SHAPES.items()
    }


def abar(dtype=np.float32):
    """Cumulative alphas, "T"."""
    return jnp.asarray(np.linspace(0.95, 0.1, T), dtype)


def batch(count, dtype=np.float32, seed=0):
    """Cached pairs: mean, std, text."""
    rng = np.random.default_rng(100 + seed)
    shape = (count, C, SIDE, SIDE)
    return {
        "mean": jnp.asarray(rng.normal(size=shape), dtype),
        "std": jnp.asarray(rng.uniform(0.01, 0.1, size=shape), dtype),
        "text": jnp.asarray(rng.normal(size=(count, L, D)), dtype),
    }
