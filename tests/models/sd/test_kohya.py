# SPDX-License-Identifier: Apache-2.0
"""LoRA by kohya's names: the weights that PyTorch makes of the file, or one line."""

import re

import numpy as np
import pytest
from command_runs import TEXT_FILE, UNET_FILE, tensors
from test_adapters import (  # noqa: F401 - a fixture
    KOHYA_TARGETS,
    TEXT_TARGETS,
    assert_weights_of,
    kohya_lora,
    our_weights,
    pipeline,
    refused,
    save,
)

from gift_jax.models.sd import kohya, lora_files
from gift_jax.models.sd.adapters import read_lora

CONVOLUTIONS = ["conv1", "conv2", "conv_shortcut", "conv", "conv_in", "conv_out"]
OTHERS = ["time_emb_proj", "time_embedding.linear_1", "time_embedding.linear_2"]

pytestmark = pytest.mark.filterwarnings("ignore")  # peft's and diffusers' own


def fused(pipeline, file, **how):  # noqa: F811 - the fixture
    """PyTorch's pipeline with a file merged. how: of `load_lora_weights`."""
    theirs, scale = pipeline(), how.pop("lora_scale", 1.0)
    theirs.load_lora_weights(str(file), **how)  # no other argument is needed
    theirs.fuse_lora(lora_scale=scale)
    theirs.unload_lora_weights()
    return theirs


def of_unet(folder):
    return kohya_lora(folder, UNET_FILE, KOHYA_TARGETS, alpha=7)


def of_unet_and_text(folder):
    """A rank of its own for each layer; another alpha for the text encoder."""
    unet = kohya_lora(folder, UNET_FILE, KOHYA_TARGETS, 7, lambda i: 2 + i % 3)
    text = kohya_lora(folder, TEXT_FILE, [*TEXT_TARGETS, "fc2"], 3, lambda i: 1 + i % 2)
    return unet | text


def of_text(folder):
    """As SDXL has the first of its two text encoders."""
    return kohya_lora(folder, TEXT_FILE, TEXT_TARGETS, 2, prefix="lora_te1_")


def of_every_layer(folder):
    """Of convolutions, too: LoCon. float16; without alpha, which is then the rank."""
    targets = [*KOHYA_TARGETS, *CONVOLUTIONS, *OTHERS]
    arrays = kohya_lora(folder, UNET_FILE, targets, alpha=0)
    return {name: array.astype(np.float16) for name, array in arrays.items()}


@pytest.mark.parametrize(
    "make, layers, scale",
    [
        (of_unet, (36, 0), 1.0),
        (of_unet_and_text, (36, 8), -0.5),
        (of_text, (0, 6), 1.0),
        (of_every_layer, (71, 0), 1.0),
    ],
)
def test_weights_are_pytorchs(pipeline, tiny_folder, tmp_path, make, layers, scale):  # noqa: F811
    file = save(tmp_path / "style.safetensors", make(tiny_folder))
    theirs = fused(pipeline, file, lora_scale=scale)
    lora = (f"{file}:{scale}",)
    ours = our_weights(tiny_folder, lora=lora)
    in_text = [name for name in ours if name.startswith("text_model.")]
    assert (len(ours) - len(in_text), len(in_text)) == layers
    assert_weights_of(theirs.unet, tiny_folder, UNET_FILE, lora=lora)
    assert_weights_of(theirs.text_encoder, tiny_folder, TEXT_FILE, lora=lora)


def test_names_of_the_original_unet(pipeline, tiny_folder, tmp_path):  # noqa: F811
    """As diffusers' pipeline of SDXL reads them, which is told of the UNet's config.

    A convolution that doubles the size is left out where no attention is before it, as
    in SD 1.x: diffusers has no place for that name and leaves the update out.
    """
    modules = {n.rpartition(".")[0] for n in tensors(tiny_folder)}
    names = kohya.original_names(modules)
    targets = [*KOHYA_TARGETS, *CONVOLUTIONS, *OTHERS]
    arrays = kohya_lora(
        tiny_folder, UNET_FILE, targets, alpha=6, rename=lambda n: names[n]
    )
    doubling = "up_blocks.0.upsamplers.0.conv"
    left_out = names[doubling].replace(".", "_")
    assert left_out == "output_blocks_1_1_conv"
    only = {n: a for n, a in arrays.items() if f"lora_unet_{left_out}." in n}
    assert len(only) == 3 and not any("down_blocks" in name for name in arrays)
    file = save(
        tmp_path / "style.safetensors",
        {n: a for n, a in arrays.items() if n not in only},
    )
    base = pipeline()
    theirs = fused(pipeline, file, unet_config=base.unet.config)
    assert len(our_weights(tiny_folder, lora=(str(file),))) == 70
    assert_weights_of(theirs.unet, tiny_folder, UNET_FILE, lora=(str(file),))
    file = save(tmp_path / "more.safetensors", only)
    assert list(our_weights(tiny_folder, lora=(str(file),))) == [f"{doubling}.weight"]


def test_each_layer_has_its_own_alpha(pipeline, tiny_folder, tmp_path):  # noqa: F811
    """By kohya's formula. diffusers takes the commonest for all attention layers."""
    targets = ["attn1.to_q"]
    arrays = kohya_lora(tiny_folder, UNET_FILE, targets, lambda i: 8 if i == 1 else 2)
    file = save(tmp_path / "style.safetensors", arrays)
    ours, base = our_weights(tiny_folder, lora=(str(file),)), tensors(tiny_folder)
    by_formula, commonest = {}, {}
    for name in ours:
        start = f"lora_unet_{name.removesuffix('.weight').replace('.', '_')}"
        down, up, alpha = (
            arrays[f"{start}.{end}"].astype(np.float64)
            for end in ("lora_down.weight", "lora_up.weight", "alpha")
        )
        by_formula[name] = base[name] + alpha / 4 * up @ down
        commonest[name] = base[name] + 2 / 4 * up @ down
        np.testing.assert_allclose(ours[name], by_formula[name], atol=2e-6)
    differ = [n for n in ours if np.abs(by_formula[n] - commonest[n]).max() > 0.01]
    assert len(ours) > 2 and len(differ) == 1
    state = fused(pipeline, file).unet.state_dict()
    np.testing.assert_allclose(state[differ[0]], commonest[differ[0]], atol=2e-6)
    # by its own names diffusers does as kohya
    other = tmp_path / "diffusers.safetensors"
    lora_files.write(other, read_lora(str(file), tiny_folder), "diffusers")
    state = fused(pipeline, other).unet.state_dict()
    for name, expected in by_formula.items():
        np.testing.assert_allclose(state[name], expected, atol=2e-6)


@pytest.mark.parametrize("by", lora_files.WRITTEN)
def test_written_file_is_read_back(pipeline, tiny_folder, tmp_path, by):  # noqa: F811
    file = save(tmp_path / "style.safetensors", of_unet_and_text(tiny_folder))
    layers = read_lora(str(file), tiny_folder)
    lora_files.write(tmp_path / "out.safetensors", layers, by)
    before = our_weights(tiny_folder, lora=(str(file),))
    after = our_weights(tiny_folder, lora=(str(tmp_path / "out.safetensors"),))
    assert len(before) == 44 and before.keys() == after.keys()
    for name, array in before.items():
        np.testing.assert_allclose(after[name], array, atol=1e-6)
    theirs = fused(pipeline, tmp_path / "out.safetensors")
    files = {"lora": (str(file),)}
    assert_weights_of(theirs.unet, tiny_folder, UNET_FILE, **files)
    assert_weights_of(theirs.text_encoder, tiny_folder, TEXT_FILE, **files)


# --- names of large models ------------------------------------------------------------


def unet_modules(resnets, attentions):
    """Modules of a UNet with so many of both at each size, from the largest."""
    names, last = ["conv_in", "conv_out", "time_embedding.linear_1"], len(resnets) - 1
    stages = [("mid_block", 2, 1)]
    stages += [(f"down_blocks.{i}", n, attentions[i]) for i, n in enumerate(resnets)]
    up = zip(resnets[::-1], attentions[::-1], strict=True)
    stages += [
        (f"up_blocks.{i}", n + 1, (n + 1) * bool(a)) for i, (n, a) in enumerate(up)
    ]
    for stage, num_resnets, num_attentions in stages:
        for i in range(num_resnets):
            names += [f"{stage}.resnets.{i}.{n}" for n in ("conv1", "time_emb_proj")]
        for i in range(num_attentions):
            names.append(f"{stage}.attentions.{i}.transformer_blocks.0.attn1.to_q")
    for i in range(last):
        names.append(f"down_blocks.{i}.downsamplers.0.conv")
        names.append(f"up_blocks.{i}.upsamplers.0.conv")
    return names


ATTN = "transformer_blocks_0_attn1_to_q"
SD1 = {  # of the checkpoints of SD 1.x and of SDXL
    "input_blocks_0_0": "conv_in",
    "input_blocks_1_0_in_layers_2": "down_blocks.0.resnets.0.conv1",
    f"input_blocks_2_1_{ATTN}": "down_blocks.0.attentions.1",
    "input_blocks_3_0_op": "down_blocks.0.downsamplers.0.conv",
    "input_blocks_11_0_emb_layers_1": "down_blocks.3.resnets.1.time_emb_proj",
    f"middle_block_1_{ATTN}": "mid_block.attentions.0",
    "middle_block_2_in_layers_2": "mid_block.resnets.1.conv1",
    "output_blocks_2_1_conv": "up_blocks.0.upsamplers.0.conv",
    f"output_blocks_3_1_{ATTN}": "up_blocks.1.attentions.0",
    "output_blocks_5_2_conv": "up_blocks.1.upsamplers.0.conv",
    f"output_blocks_11_1_{ATTN}": "up_blocks.3.attentions.2",
    "out_2": "conv_out",
    "time_embed_0": "time_embedding.linear_1",
}
SDXL = {
    f"input_blocks_4_1_{ATTN}": "down_blocks.1.attentions.0",
    "input_blocks_6_0_op": "down_blocks.1.downsamplers.0.conv",
    f"input_blocks_8_1_{ATTN}": "down_blocks.2.attentions.1",
    f"output_blocks_0_1_{ATTN}": "up_blocks.0.attentions.0",
    "output_blocks_2_2_conv": "up_blocks.0.upsamplers.0.conv",
    f"output_blocks_5_1_{ATTN}": "up_blocks.1.attentions.2",
    "output_blocks_8_0_in_layers_2": "up_blocks.2.resnets.2.conv1",
}


@pytest.mark.parametrize(
    "resnets, attentions, expected",
    [((2, 2, 2, 2), (2, 2, 2, 0), SD1), ((2, 2, 2), (0, 2, 2), SDXL)],
)
def test_original_names_of_large_models(resnets, attentions, expected):
    modules = unet_modules(resnets, attentions)
    names = kohya.modules_by_name("unet", modules)
    for name, module in expected.items():
        assert names[name].startswith(module), name
        assert names[names[name].replace(".", "_")] == names[name]
    assert len(names) == 2 * len(modules)


@pytest.mark.parametrize(
    "start, end",
    [
        ("lora_te2_", ("lora_down.weight", "lora_up.weight")),
        ("text_encoder_2.", ("lora_linear_layer.down.weight", "lora.up.weight")),
    ],
)
def test_second_text_encoder(tmp_path, start, end):
    """With targets of one, by hand: its layers are not those of the first."""
    modules = "text_model.encoder.layers.1.mlp.fc1", "text_projection"
    targets = {
        component: {f"{m}.weight": (f"{component}/{m}/kernel", (6, 4)) for m in modules}
        for component in ("text_encoder", "text_encoder_2")
    }
    arrays = {}
    for module in modules:
        name = module.replace(".", "_") if start.endswith("_") else module
        for half, shape in zip(end, ((2, 4), (6, 2)), strict=True):
            arrays[f"{start}{name}.{half}"] = np.ones(shape, np.float32)
    file = save(tmp_path / "x.safetensors", arrays)
    layers = lora_files.read_layers(file, targets)
    assert {layer.path for layer in layers} == {
        f"text_encoder_2/{module}/kernel" for module in modules
    }
    assert {(layer.rank, layer.alpha) for layer in layers} == {(2, 2)}


# --- what is refused ------------------------------------------------------------------

LAYER = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
OLD = "lora_unet_middle_block_1_transformer_blocks_0_attn1_to_q"
A, B = np.ones((2, 64), np.float32), np.ones((64, 2), np.float32)
ALPHA = {f"{LAYER}.alpha": np.float32([2])}
PAIR = {f"{LAYER}.lora_down.weight": A, f"{LAYER}.lora_up.weight": B}
WHOLE = PAIR | ALPHA
XL = {n.replace("mid_block", "down_blocks_1"): a for n, a in WHOLE.items()}


def renamed(arrays, new, old=LAYER):
    return {name.replace(old, new): array for name, array in arrays.items()}


@pytest.mark.parametrize(
    "arrays, message",
    [
        (
            renamed(WHOLE, "lora_unet_double_blocks_0_img_attn_proj") | WHOLE,
            r"proj.alpha changes lora_unet_double_blocks_0_img_attn_proj, which this "
            "model does not have; 3 of 6 tensors do not fit: is the file made for",
        ),
        (renamed(WHOLE, "lora_te2_text_projection"), "changes text_encoder_2, which"),
        (renamed(WHOLE, "lora_te3_x"), "lora_te3_x.alpha is no tensor of a LoRA"),
        (renamed(WHOLE, "lora_unet_conv_norm_out"), "changes conv_norm_out, which"),
        (ALPHA, "alpha has no lora_down and lora_up beside it; 1 of 1 tensors"),
        ({f"{LAYER}.lora_down.weight": A} | ALPHA, "lora_down.weight has no other hal"),
        ({f"{LAYER}.lora_up.weight": B}, "lora_up.weight has no other half; 1 of 1"),
        (PAIR | {f"{LAYER}.alpha": A}, r"alpha has shape \[2, 64\], not one number"),
        (PAIR | {f"{LAYER}.alpha": np.float32([])}, r"alpha has shape \[0\], not one"),
        (PAIR | {f"{LAYER}.alpha": np.float32([0])}, "alpha is 0; must be a finite nu"),
        (PAIR | {f"{LAYER}.alpha": np.float32([np.nan])}, "alpha is nan; must be a "),
        (PAIR | {f"{LAYER}.alpha": np.array([True])}, "alpha has dtype BOOL; must be"),
        (WHOLE | renamed(WHOLE, OLD), "middle_block_1_.*is there twice, also as lora_"),
        (
            WHOLE
            | {
                "unet.mid_block.attentions.0.transformer_blocks.0.attn1"
                ".processor.to_q_lora.down.weight": A
            },
            "is there twice, also as lora_unet_mid_block",
        ),
        (
            WHOLE | {f"{LAYER}.lora_down.weight": A[:, :32]},
            r"\[2, 32\], which gives no",
        ),
        (
            {n: a[..., None, None] if a.ndim > 1 else a for n, a in WHOLE.items()},
            r"has shape \[2, 64, 1, 1\], which gives no update",
        ),
        (WHOLE | {f"{LAYER}.dora_scale": B}, "dora_scale is of a DoRA, which is not"),
        ({f"{LAYER}.hada_w1_a": A}, "hada_w1_a is of a LoKr or LoHa, which are not"),
        (WHOLE | {f"{LAYER}.lokr_w1": A}, "lokr_w1 is of a LoKr or LoHa"),
        (WHOLE | {f"{LAYER}.lora_mid.weight": A}, "is of a LoCon in Tucker form, whic"),
        (WHOLE | {f"{LAYER}.diff": A}, "diff is of another kind of update than LoRA"),
        (WHOLE | {f"{LAYER}.lora_up.bias": A}, "bias is of another kind of update"),
        ({LAYER: A}, "to_q is of another kind of update than LoRA and LoCon, which"),
        ({f"{LAYER}.alpha\n": A}, "is of another kind of update"),
    ],
)
def test_kohya_file_that_does_not_fit_is_one_line(
    tiny_folder, tmp_path, arrays, message
):
    file = save(tmp_path / "x.safetensors", arrays)
    refused(tiny_folder, message, lora=(str(file),))


def test_model_that_a_file_names_is_the_remedy(tiny_folder, tmp_path):
    arrays = renamed(WHOLE, "lora_unet_input_blocks_8_1_proj_in")
    notes = {"ss_base_model_version": "sdxl_base_v1-0\n"}
    file = save(tmp_path / "x.safetensors", arrays, **notes)
    message = (
        "3 of 3 tensors do not fit: it says that it is made for "
        r"'sdxl_base_v1-0\n'; use such a model"
    )
    refused(tiny_folder, re.escape(message), lora=(str(file),))
    half = {f"{LAYER}.lora_down.weight": A}  # whatever model it is for
    file = save(tmp_path / "x.safetensors", half, **notes)
    refused(tiny_folder, "no other half; 1 of 1.*another model", lora=(str(file),))
    fits = save(tmp_path / "x.safetensors", WHOLE, **notes)
    assert len(our_weights(tiny_folder, lora=(str(fits),))) == 1
