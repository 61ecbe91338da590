# SPDX-License-Identifier: Apache-2.0
"""Keys of config.json: computed as PyTorch computes them, harmless, or refused."""

import inspect
import math

import jax
import numpy as np
import pytest
from properties import outcome
from tiny_model import TINY_TEXT, TINY_VAE, WHOLE_UNET, random_params, relative_error

from gift_jax.models import exports, kinds, sd, weights
from gift_jax.models.kinds import KINDS
from gift_jax.models.params import parameter_shapes

CONFIGS = {"unet": WHOLE_UNET, "vae": TINY_VAE, "text_encoder": TINY_TEXT}
STRANGE = (  # values of every JSON type, and numbers that no size can be
    *(None, True, False, 0, 1, -1, 2, 2.0, 0.5, 1e300, 10**30, math.nan, math.inf),
    *("", "2", "silu", "x" * 10_000, "\n\x1b[1m"),
    *([], [None], [2], [-1], ["2"], [[2]], [2, 2, 2], [2, 2], [True, False], {}),
    *({"a": 1},),
)


def check(kind, **changes):
    config = CONFIGS[kind] | changes
    kinds.check_config(kind, config, f"{kind}/config.json")
    return config


def torch_class(kind):
    if kind == "text_encoder":
        from transformers import CLIPTextConfig

        return CLIPTextConfig
    import diffusers

    return getattr(diffusers, KINDS[kind].extra_config["_class_name"])


@pytest.mark.parametrize("kind", ["unet", "vae", "text_encoder"])
def test_every_key_of_todays_class_is_known_with_its_default(kind):
    pytest.importorskip("torch")
    keys, signature = KINDS[kind].keys, inspect.signature(torch_class(kind))
    parameters = {
        name: parameter.default
        for name, parameter in signature.parameters.items()
        if parameter.kind is not parameter.VAR_KEYWORD and name != "self"
    }
    assert set(parameters) - set(keys.rules) - keys.harmless == set()
    for name, default in parameters.items():
        if name in keys.defaults:
            assert keys.defaults[name] == default, name
        elif name in keys.rules:
            assert keys.rules[name].allows(default), name


@pytest.mark.parametrize("kind", ["unet", "vae", "text_encoder"])
def test_a_value_of_any_type_is_accepted_or_refused_by_the_keys_name(kind):
    keys, own = KINDS[kind].keys, CONFIGS[kind]
    for name in [*keys.rules, *own, "no_such_key", "text_config", "", "a\nb"]:
        usual = own.get(name, keys.defaults.get(name))
        for value in STRANGE:
            config, message = outcome(lambda n=name, v=value: check(kind, **{n: v}))
            if config is None:
                assert message.startswith(f"{kind}/config.json: ")
            elif name in keys.defaults and isinstance(value, list) and value != usual:
                assert build(kind, config), (name, value)  # seconds, so of lists alone


def build(kind, config):
    module = KINDS[kind].build(kinds.effective(kind, config))
    return parameter_shapes(module)


@pytest.mark.parametrize(
    "kind, changes, message",
    [
        ("unet", dict(time_embedding_act_fn="mish"), "time_embedding_act_fn='mish'"),
        ("unet", dict(act_fn="gelu"), "act_fn='gelu' is not supported; must be 'silu'"),
        ("unet", dict(dropout=0.1), "dropout=0.1 is not supported; must be 0"),
        ("unet", dict(encoder_hid_dim=8), "encoder_hid_dim=8"),
        ("unet", dict(mid_block_type="UNetMidBlock2DSimpleCrossAttn"), "mid_block_typ"),
        ("unet", dict(attention_head_dim=[2, 4, 4, 4]), "has 4 entries, block_out_ch"),
        ("unet", dict(attention_head_dim=5), "attention_head_dim has 5, the number of"),
        ("unet", dict(layers_per_block=[1]), "layers_per_block has 1 entries"),
        ("unet", dict(layers_per_block="1"), "layers_per_block='1' is not supported"),
        ("unet", dict(cross_attention_dim=[32, 64]), "must be equal"),
        ("unet", dict(addition_embed_type="image"), "addition_embed_type='image'"),
        ("unet", dict(addition_embed_type="text_time"), "addition_time_embed_dim=None"),
        ("unet", dict(quantization_config={"bits": 4}), "quantization_config={'bits'"),
        ("unet", dict(new_option=True), "new_option=True is of no known key"),
        ("unet", dict(down_block_types=["DownBlock2D"] * 3), "has 3 entries"),
        ("vae", dict(down_block_types=["DownEncoderBlock2D"]), "has 1 entries"),
        ("vae", dict(latents_mean=[0.5] * 4), "latents_mean="),
        ("vae", dict(norm_num_groups=0), "norm_num_groups=0"),
        ("text_encoder", dict(use_attention_mask=True), "use_attention_mask=True"),
        ("text_encoder", dict(hidden_act="gelu_fast"), "hidden_act='gelu_fast'"),
        (
            "text_encoder",
            dict(num_attention_heads=5),
            "multiple of num_attention_h",
        ),
        ("text_encoder", dict(text_config=None), "text_config=None; must be an object"),
        ("text_encoder", dict(text_config={"is_causal": False}), "is_causal=False"),
    ],
)
def test_what_is_not_computed_is_refused_by_name(kind, changes, message):
    assert message in outcome(lambda: check(kind, **changes))[1]


@pytest.mark.parametrize(
    "kind, changes",
    [
        ("unet", dict(_name_or_path="x", decay=0.9999, upcast_attention=True)),
        ("unet", dict(num_class_embeds=None, new_option=None)),
        ("vae", dict(force_upcast=False, shift_factor=None, _commit_hash="0")),
        ("text_encoder", dict(torch_dtype="float16", transformers_version="4.20")),
        ("text_encoder", dict(id2label={"0": "a"}, use_attention_mask=False)),
    ],
)
def test_harmless_keys_are_accepted(kind, changes):
    check(kind, **changes)


# --- computed as PyTorch computes them ------------------------------------------------

UNETS = {
    "lists": dict(
        layers_per_block=[1, 2],
        attention_head_dim=[2, 4],
        transformer_layers_per_block=[2, 1],
        down_block_types=["CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        up_block_types=["CrossAttnUpBlock2D", "UpBlock2D"],
        cross_attention_dim=[32, 32],
        only_cross_attention=[False, True],
        time_embedding_act_fn="silu",
        conv_in_kernel=5,
        norm_num_groups=16,
        norm_eps=1e-3,
    ),
    "no middle": dict(
        mid_block_type=None,
        timestep_post_act="gelu",
        time_embedding_act_fn="relu",
        time_embedding_dim=48,
        conv_out_kernel=1,
        freq_shift=1,
        flip_sin_to_cos=False,
    ),
    "plain middle": dict(
        mid_block_type="UNetMidBlock2D",
        center_input_sample=True,
        downsample_padding=0,
        timestep_post_act="silu",
    ),
}


def write(folder, kind, changes):
    config = check(kind, **changes)
    module = KINDS[kind].build(config)
    exports.save_model_folder(folder, config, random_params(module, 0))
    return weights.load_component(folder, kind)[:2]


@pytest.mark.parametrize("name", UNETS)
def test_options_of_the_unet_are_pytorchs(name, tmp_path, rng):
    torch = pytest.importorskip("torch")
    unet, params = write(tmp_path, "unet", UNETS[name])
    theirs = torch_class("unet").from_pretrained(str(tmp_path))
    z = rng.normal(size=(1, 4, 8, 12)).astype(np.float32)  # not square
    c = rng.normal(size=(1, 16, 32)).astype(np.float32)
    t = np.asarray([621], np.int32)
    ours = jax.jit(lambda p: sd.apply_unet(unet, p, z, t, c)[0])(params)
    with torch.no_grad():
        expected = theirs(*map(torch.tensor, (z, t, c))).sample.numpy()
    assert relative_error(ours, expected) < 1e-5


def test_options_of_the_vae_are_pytorchs(tmp_path, rng):
    torch = pytest.importorskip("torch")
    options = dict(use_quant_conv=False, use_post_quant_conv=False)
    options |= dict(mid_block_add_attention=False, norm_num_groups=16)
    vae, params = write(tmp_path, "vae", options)
    theirs = torch_class("vae").from_pretrained(str(tmp_path))
    x = rng.uniform(-1, 1, size=(1, 3, 16, 24)).astype(np.float32)
    z = rng.normal(size=(1, 4, 8, 12)).astype(np.float32)
    mean, image = jax.jit(
        lambda p: (
            sd.apply_vae_encode(vae, p, x)[0],
            sd.apply_vae_decode(vae, p, z),
        )
    )(params)
    with torch.no_grad():
        expected = theirs.encode(torch.tensor(x)).latent_dist.mean.numpy()
        assert relative_error(mean, expected) < 1e-5
        expected = theirs.decode(torch.tensor(z)).sample.numpy()
    assert relative_error(image, expected) < 1e-5
