# SPDX-License-Identifier: Apache-2.0
"""SD 3 and 3.5 against PyTorch: small always, the published size if slow.

    python -m pytest -m slow -s tests/models/mmdit/test_mmdit_full_size.py

Prints the errors reached. The slow ones are SD 3.5 medium's transformer and the VAE:
10 GB of disk, and one side's 10 GB of memory at a time.
"""

import gc
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_model import check_equal

from gift_jax.models import mmdit, sd, weights
from gift_jax.models.mmdit import architectures
from gift_jax.models.sd import random_weights

slow = pytest.mark.slow
MODELS = ["small", pytest.param("whole", marks=slow)]
# All but the widths, the depth and the table of places is as published.
SMALL = {
    "transformer": {
        "caption_projection_dim": 128,
        "dual_attention_layers": [0, 1, 2],
        "joint_attention_dim": 96,
        "num_attention_heads": 2,
        "num_layers": 6,
        "pooled_projection_dim": 56,
        "pos_embed_max_size": 24,
        "sample_size": 16,
    },
    "vae": {"block_out_channels": [32, 32, 64, 64], "layers_per_block": 1},
}
CLASSES = {"transformer": "SD3Transformer2DModel", "vae": "AutoencoderKL"}


@pytest.fixture
def folder(tmp_path):
    """Where a component is written; removed after, since it may be gigabytes."""
    yield tmp_path / "model"
    shutil.rmtree(tmp_path)
    gc.collect()


def config_of(size, kind):
    config = architectures.MODELS["sd3.5-medium"][kind]
    return config | SMALL[kind] if size == "small" else config


def compare(size, kind, folder, ours_of, theirs_of):
    """Writes a component and compares two functions of it: (module, params), (model).

    Ours is computed first and freed, so that one model is in memory at a time.
    """
    import diffusers
    import torch

    random_weights.write_component(folder, kind, config_of(size, kind))
    module, params, _ = weights.load_component(folder, kind, place=jnp.asarray)
    ours = jax.device_get(jax.jit(lambda p: ours_of(module, p))(params))
    del params
    gc.collect()

    def theirs(dtype):
        cls = getattr(diffusers, CLASSES[kind])
        model = cls.from_pretrained(str(folder), torch_dtype=dtype).eval()
        with torch.no_grad():
            arrays = theirs_of(model, lambda a: torch.tensor(a, dtype=dtype))
        return {name: a.numpy() for name, a in arrays.items()}

    def theirs_in_double():
        gc.collect()  # the float32 model
        return theirs(torch.float64)

    in_double = None if size == "whole" and kind == "transformer" else theirs_in_double
    check_equal(f"{size} {kind}", ours, theirs(torch.float32), in_double)


@pytest.mark.parametrize("size", MODELS)
def test_transformer_equals_pytorch(size, folder, rng):
    pytest.importorskip("torch")
    config = config_of(size, "transformer")
    side = 16 if size == "small" else 32
    z = rng.normal(size=(1, 16, side, side)).astype(np.float32)
    states = rng.normal(size=(1, 93, config["joint_attention_dim"])).astype(np.float32)
    pooled = rng.normal(size=(1, config["pooled_projection_dim"])).astype(np.float32)
    t = np.float32([621.5])

    def ours(module, p):
        return {"output": mmdit.apply_transformer(module, p, z, t, states, pooled)[0]}

    def theirs(model, put):
        return {"output": model(put(z), put(states), put(pooled), put(t)).sample}

    compare(size, "transformer", folder, ours, theirs)


@pytest.mark.parametrize("size", MODELS)
def test_vae_equals_pytorch(size, folder, rng):
    pytest.importorskip("torch")
    side = 4 if size == "small" else 32
    x = rng.uniform(-1, 1, size=(1, 3, 8 * side, 8 * side)).astype(np.float32)
    z = rng.normal(size=(1, 16, side, side)).astype(np.float32)

    def ours(vae, p):
        mean, logvar = sd.apply_vae_encode(vae, p, x)
        return {"mean": mean, "logvar": logvar, "image": sd.apply_vae_decode(vae, p, z)}

    def theirs(vae, put):
        posterior = vae.encode(put(x)).latent_dist
        moments = {"mean": posterior.mean, "logvar": posterior.logvar}
        return moments | {"image": vae.decode(put(z)).sample}

    compare(size, "vae", folder, ours, theirs)
