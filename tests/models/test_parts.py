# SPDX-License-Identifier: Apache-2.0
"""What a folder holds is checked against its family's layout, and tells its family."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest

from gift_jax.models import load, parts
from gift_jax.models.parts import CLIP_TOKENIZER, Layout, TokenizerKind
from gift_jax.models.sd import stable_diffusion
from gift_jax.runtime.errors import UserError

T5 = TokenizerKind(("T5TokenizerFast", "T5Tokenizer"), str)
LAYOUT = Layout(
    "Other Diffusion",
    {"transformer": "OtherTransformer2DModel", "vae": "AutoencoderKL"},
    {"tokenizer": CLIP_TOKENIZER, "tokenizer_3": T5},
)
NAMES = {
    "transformer": "OtherTransformer2DModel",
    "vae": "AutoencoderKL",
    "tokenizer": "CLIPTokenizerFast",
    "tokenizer_3": "T5Tokenizer",
    "scheduler": "FlowMatchEulerDiscreteScheduler",
}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"transformer": None}, "transformer is None; must be OtherTransformer2DModel"),
        ({"vae": "AutoencoderTiny"}, "vae is AutoencoderTiny; must be AutoencoderKL"),
        ({"tokenizer_3": "CLIPTokenizer"}, "tokenizer_3 is .*must be T5TokenizerFast"),
        ({"unet": "X"}, "has the component 'unet', which no Other Diffusion has"),
    ],
)
def test_layout_names_what_a_folder_has_beside_it(tmp_path, change, message):
    file = tmp_path / "model_index.json"
    assert LAYOUT.denoiser == "transformer"
    LAYOUT.check(NAMES, file)
    names = {name: cls for name, cls in (NAMES | change).items() if cls}
    with pytest.raises(UserError, match=f"^{file}: {message}"):
        LAYOUT.check(names, file)


def test_parts_are_read_in_the_layouts_order(tiny, tiny_folder):
    read = parts.read(tiny_folder, stable_diffusion._ONE, jnp.dtype("float32"))
    assert list(read.modules) == list(read.params) == ["unet", "vae", "text_encoder"]
    assert read.configs.keys() == read.modules.keys() | {"scheduler"}
    assert len(read.tokenizers) == 1
    biases = (p["vae"]["quant_conv"]["bias"] for p in (read.params, tiny.params))
    np.testing.assert_array_equal(*biases)


@pytest.mark.parametrize("resolution, fix", [(500, 496), (-8, 16), (3, 16)])
def test_resolution_divides_into_latents(resolution, fix):
    assert parts.side_at(512, 8, 2, "why") == 64
    message = f"resolution={resolution} must be a multiple of 16, why; try {fix}"
    with pytest.raises(UserError, match=message):
        parts.side_at(resolution, 8, 2, "why")


def test_folder_is_of_the_family_that_has_its_pipeline(
    tiny_folder, tmp_path, monkeypatch
):
    other = dataclasses.replace(
        stable_diffusion.FAMILY,
        pipelines=("OtherPipeline",),
        published={"org/other": {"of": "other"}},
        load=lambda folder, dtype, **how: ("loaded", dtype, how),
        abstract_model=lambda configs, dtype, resolution: (configs, resolution),
        read_adapters=lambda files, folder, variant: "adapters",
    )
    monkeypatch.setattr(load, "FAMILIES", (stable_diffusion.FAMILY, other))
    assert load.family_of(tiny_folder) is stable_diffusion.FAMILY
    index = tmp_path / "model_index.json"
    index.write_text("{}")
    assert load.family_of(tmp_path) is stable_diffusion.FAMILY
    index.write_text(json.dumps({"_class_name": "OtherPipeline"}))
    assert load.family_of(tmp_path) is other
    assert load.read_adapters(None, tmp_path) == "adapters"
    assert load.abstract_model("org/other", resolution=8) == ({"of": "other"}, 8)
    index.write_text(json.dumps({"_class_name": "ThirdPipeline"}))
    message = "'ThirdPipeline' is not supported; must be one of Stable.*, OtherPipeline"
    with pytest.raises(UserError, match=message):
        load.family_of(tmp_path)
