# SPDX-License-Identifier: Apache-2.0
"""Stable Diffusion 3's components: files, config.json, what trains, published sizes."""

import inspect
import json
import re

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from properties import outcome
from tiny_sd3 import TINY_SD3, build, configs

from gift_jax import train
from gift_jax.models import exports, kinds, mmdit, safetensors_io, weights
from gift_jax.models.kinds import KINDS
from gift_jax.models.mmdit import architectures, trainable
from gift_jax.models.params import parameter_shapes
from gift_jax.models.sd import architectures as sd_architectures
from gift_jax.models.trainable import select_trainable
from gift_jax.runtime.errors import UserError
from gift_jax.training.sharding import partition_spec

# --- files ----------------------------------------------------------------------------


def torch_component(name):
    """Returns a tiny component of PyTorch's classes."""
    import diffusers
    import transformers

    config = configs("sd3.5-medium")[name]
    if name == "transformer":
        return diffusers.SD3Transformer2DModel.from_config(config)
    if name == "vae":
        return diffusers.AutoencoderKL.from_config(config)
    if name == "text_encoder_3":
        return transformers.T5EncoderModel(transformers.T5Config(**config))
    config = transformers.CLIPTextConfig(**config)
    return transformers.CLIPTextModelWithProjection(config)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", mmdit.KIND_OF)
def test_files_survive_byte_for_byte(name, dtype, tmp_path):
    """Of PyTorch's own, read and written again."""
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    model = torch_component(name).to(getattr(torch, dtype))
    model.save_pretrained(str(tmp_path / "theirs"))
    kind = mmdit.KIND_OF[name]
    _, params, config = weights.load_component(tmp_path / "theirs", kind)
    dtype = safetensors_io.DTYPES["BF16"] if dtype == "bfloat16" else np.float32
    exports.save_model_folder(tmp_path / "ours", config, params, dtype)
    file = f"{KINDS[kind].stem}.safetensors"
    theirs = (tmp_path / "theirs" / file).read_bytes()
    assert len(theirs) > 10_000
    assert (tmp_path / "ours" / file).read_bytes() == theirs


# --- config.json ----------------------------------------------------------------------


def signature(name):
    import diffusers
    import transformers

    cls = {
        "transformer": diffusers.SD3Transformer2DModel,
        "text_encoder_3": transformers.T5Config,
    }[name]
    return {
        key: parameter.default
        for key, parameter in inspect.signature(cls).parameters.items()
        if parameter.kind is not parameter.VAR_KEYWORD
    }


@pytest.mark.parametrize("kind", ["transformer", "text_encoder_3"])
def test_every_key_of_todays_class_is_known_with_its_default(kind):
    pytest.importorskip("torch")
    keys, parameters = KINDS[kind].keys, signature(kind)
    assert set(parameters) - set(keys.rules) - keys.harmless == set()
    for name, default in parameters.items():
        if name in keys.defaults:
            assert keys.defaults[name] == default, name
        elif name in keys.rules:
            assert keys.rules[name].allows(default), name


@pytest.mark.parametrize("name", architectures.MODELS)
def test_published_configs_are_accepted(name):
    for folder, kind in mmdit.KIND_OF.items():
        config = json.loads(json.dumps(architectures.MODELS[name][folder]))
        kinds.check_config(kind, config, folder)


@pytest.mark.parametrize(
    "kind, changes, message",
    [
        ("transformer", dict(qk_norm="layer_norm"), "qk_norm='layer_norm' is not supp"),
        ("transformer", dict(caption_projection_dim=64), "attention_head_dim=32"),
        ("transformer", dict(pos_embed_max_size=None), "pos_embed_max_size=None"),
        ("transformer", dict(dual_attention_layers=[-1]), "dual_attention_layers=[-1]"),
        ("transformer", dict(sample_size=1), "sample_size=1 must be at least patch_si"),
        ("transformer", dict(joint_layers=2), "joint_layers=2 is of no known key"),
        (
            "transformer",
            dict(attention_head_dim=1, num_attention_heads=6, caption_projection_dim=6),
            "attention_head_dim=6 must divide by 4",
        ),
        ("text_encoder_3", dict(feed_forward_proj="relu"), "must be 'gated-gelu'"),
        ("text_encoder_3", dict(dense_act_fn="gelu"), "dense_act_fn='gelu' is not su"),
        ("text_encoder_3", dict(is_decoder=True), "is_decoder=True is not supported"),
        (
            "text_encoder_3",
            dict(relative_attention_max_distance=4),
            "relative_attention_max_distance=4 must be above a quarter of",
        ),
    ],
)
def test_what_is_not_computed_is_refused_by_name(kind, changes, message):
    config = TINY_SD3[kind] | changes
    with pytest.raises(UserError, match=re.escape(message)):
        kinds.check_config(kind, config, "config.json")


def test_old_t5_is_refused_though_its_config_does_not_name_it():
    config = {k: v for k, v in TINY_SD3["text_encoder_3"].items() if "proj" not in k}
    message = outcome(lambda: kinds.check_config("text_encoder_3", config, "x"))[1]
    assert "feed_forward_proj must be 'gated-gelu'" in message


# --- what trains, and where -----------------------------------------------------------

_TEXT = {"add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"}
_TEXT |= {"norm_added_q", "norm_added_k"}
_IMAGE = {"to_q", "to_k", "to_v", "to_out_0", "norm_q", "norm_k"}
EXPECTED = {  # layers of the first block, of both attentions
    "cross_attention": {f"attn/{name}" for name in _TEXT},
    "text_stream": {f"attn/{name}" for name in _TEXT},
    "image_stream": {f"{attn}/{name}" for attn in ("attn", "attn2") for name in _IMAGE},
}
EXPECTED["attention"] = EXPECTED["text_stream"] | EXPECTED["image_stream"]


@pytest.mark.parametrize("rule", EXPECTED)
def test_rule_selects_its_layers(rule):
    _, params = build("sd3.5-medium")
    chosen, frozen = select_trainable(params, rule, mmdit.TRAINABLE_SETS)
    block = "transformer_blocks_0/"
    names = {p.removeprefix(block).rsplit("/", 1)[0] for p in chosen if block in p}
    assert names == EXPECTED[rule]
    assert all(p.startswith("transformer_blocks_") for p in chosen)
    last = {p for p in chosen if "blocks_2/" in p}
    assert bool(last) and not any("to_add_out" in p for p in last)
    assert chosen.keys() | frozen.keys() == flatten_dict(params, sep="/").keys()


def test_all_selects_what_pytorch_calls_parameters():
    torch = pytest.importorskip("torch")
    chosen, frozen = select_trainable(
        build("sd3.5-medium")[1], "all", mmdit.TRAINABLE_SETS
    )
    assert set(frozen) == {"pos_embed/pos_embed"}
    with torch.device("meta"):
        names = {n for n, _ in torch_component("transformer").named_parameters()}
    assert {safetensors_io.torch_name(path) for path in chosen} == names


def test_every_set_is_of_a_test_and_may_be_named():
    assert set(mmdit.TRAINABLE_SETS) == {*EXPECTED, "all"}
    config = train.get_config("gift")
    config.samples.prompts = ("a",)
    for name in mmdit.TRAINABLE_SETS:
        config.trainable = name
        assert train.resolve(config, with_data=False).trainable == name


def test_lora_goes_where_diffusers_example_puts_it():
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    targets = ["attn.add_k_proj", "attn.add_q_proj", "attn.add_v_proj"]
    targets += ["attn.to_add_out", "attn.to_k", "attn.to_out.0", "attn.to_q"]
    config = peft.LoraConfig(r=2, target_modules=[*targets, "attn.to_v"])
    with torch.device("meta"):
        model = torch_component("transformer")
        model.add_adapter(config)
    theirs = {
        name
        for name, part in model.named_modules()
        if "default" in getattr(part, "lora_A", ())
    }
    flat = flatten_dict(build("sd3.5-medium")[1], sep="/")
    paths = [path for path in flat if re.search(trainable.LORA_TARGETS, path)]
    ours = {safetensors_io.torch_name(p).removesuffix(".weight") for p in paths}
    assert ours == theirs and len(ours) == 3 * 8 - 1


def test_layers_that_follow_each_other_are_divided_alike():
    """Columns of the first, rows of the second: what lies between stays in parts."""
    flat = flatten_dict(build("sd3.5-medium")[1], sep="/")
    sizes = {"fsdp": 2, "tensor": 2}
    specs = {
        path: tuple(partition_spec(path, a.shape, sizes, trainable.PARTITION_RULES))
        for path, a in flat.items()
    }
    block = "transformer_blocks_0"
    for path in ("attn/to_q", "attn/add_v_proj", "attn2/to_k", "ff_context/net_0/proj"):
        assert specs[f"{block}/{path}/kernel"] == ("fsdp", "tensor"), path
    for path in ("attn/to_out_0", "attn/to_add_out", "attn2/to_out_0", "ff/net_2"):
        assert specs[f"{block}/{path}/kernel"] == ("tensor", "fsdp"), path
    assert specs["pos_embed/pos_embed"][-1] == "fsdp"
    assert all("fsdp" in specs[path] for path in flat if path.endswith("/kernel"))


# --- the published models -------------------------------------------------------------


@pytest.mark.parametrize(
    "name, transformer",
    [
        ("sd3-medium", 2_028_328_000 + 192**2 * 1536),
        ("sd3.5-medium", 2_243_171_520 + 384**2 * 1536),
        ("sd3.5-large", 8_056_627_520 + 192**2 * 2432),
    ],
)
def test_parameters_are_those_of_the_published_models(name, transformer):
    published = architectures.MODELS[name]
    modules = {n: KINDS[kind].build(published[n]) for n, kind in mmdit.KIND_OF.items()}
    if name != "sd3-medium":  # alike, and tracing takes seconds
        modules = {"transformer": modules["transformer"]}
    counts = {
        name: sum(a.size for a in jax.tree.leaves(parameter_shapes(module)))
        for name, module in modules.items()
    }
    expected = {
        "transformer": transformer,
        "vae": 83_819_683,
        "text_encoder": 123_650_304,
        "text_encoder_2": 694_659_840,
        "text_encoder_3": 4_762_310_656,
    }
    assert counts == {name: expected[name] for name in counts}


def test_hub_ids_are_of_no_two_families():
    assert not architectures.IDS.keys() & sd_architectures.IDS.keys()
    assert set(architectures.IDS.values()) == set(architectures.MODELS)
