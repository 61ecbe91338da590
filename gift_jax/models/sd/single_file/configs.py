# SPDX-License-Identifier: Apache-2.0
"""The configs of a model folder, from the shapes of a single file's tensors.

What shapes do not say is as in the published models: a UNet whose attention has 1x1
convolutions at its ends has 8 heads (SD 1.x), one with linear layers has heads of 64
channels (SD 2.x, XL), and so have the text encoders.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from gift_jax.models.sd import architectures
from gift_jax.models.sd.single_file import tensors
from gift_jax.models.sd.single_file.families import Family, Text
from gift_jax.models.sd.single_file.tensors import Tensor
from gift_jax.runtime.errors import UserError, one_line

LAYERS_USED = 23  # of SD 2.x's OpenCLIP, which has 24: the last but one's state is used
_HEAD = 64  # channels of a head
_HEADS = 8  # of SD 1.x
_GROUPS = 32  # of every group norm
_FACTOR = 8  # pixels a latent, along a side, of a VAE that is elsewhere
_GELU_WIDTHS = (1024, 1280)  # of OpenCLIP's encoders, if they have transformers' names
_RESOLUTIONS = {
    ("sd21", "v_prediction"): 768,
    ("sdxl", "epsilon"): 1024,
    ("sdxl", "v_prediction"): 1024,
}

Configs = dict[str, dict[str, Any]]


def infer(
    file: Path,
    shapes: Mapping[str, tuple[int, ...]],
    family: Family,
    prediction: str,
    *,
    has_vae: bool = True,
    resolution: int = 0,
    zero_snr: bool = False,
) -> Configs:
    """Returns {component: config.json} of a model folder, scheduler's too.

    Args: shapes: of the file's tensors, by their original names. prediction: what the
      UNet predicts. has_vae: whether the VAE is in the file. resolution: pixels,
      square, that the file names; 0: as the published model. zero_snr: whether the
      noise reaches no signal at its last step.
    Raises: UserError naming a tensor that every Stable Diffusion has and the file has
      not, or whose shape none has.
    """
    of = _Shapes(file, shapes)
    pixels = resolution or _RESOLUTIONS.get((family.name, prediction), 512)
    published = architectures.MODELS[family.name]
    scheduler = published["scheduler"] | {"prediction_type": prediction}
    if zero_snr:
        scheduler |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    configs, factor = {"scheduler": scheduler}, _FACTOR
    if has_vae:
        configs["vae"] = published["vae"] | _vae(of) | {"sample_size": pixels}
        factor = 2 ** (len(configs["vae"]["block_out_channels"]) - 1)
    unet = _unet(of, published["unet"]) | {"sample_size": pixels // factor}
    configs["unet"] = published["unet"] | unet
    for component, text in family.text.items():
        is_pooled = component == "text_encoder_2"
        fields = _text(of, text, is_pooled=is_pooled, drops_last=family.name == "sd21")
        configs[component] = published[component] | fields
    return configs


def resolution(metadata: Mapping[str, str]) -> int:
    """Returns the pixels of a side that a header names, 0 if none or no square."""
    sides = re.fullmatch(
        r"(\d{2,4})x(\d{2,4})", metadata.get("modelspec.resolution", "")
    )
    if not sides or sides[1] != sides[2] or int(sides[1]) % 64:
        return 0
    return int(sides[1])


def all_tensors(configs: Configs, family: Family) -> dict[str, list[Tensor]]:
    """Returns {component: its tensors} of a model with these configs."""
    result = {}
    for kind, build in (("unet", tensors.unet), ("vae", tensors.vae)):
        if kind in configs:
            result[kind] = list(build(configs[kind]))
    for component, text in family.text.items():
        config = configs[component]
        if text.is_open_clip:
            is_pooled = component == "text_encoder_2"
            rows = tensors.open_clip(config, text.prefix, projection=is_pooled)
        else:
            rows = tensors.clip(config, text.prefix)
        result[component] = list(rows)
    return result


class _Shapes:
    """The shapes in a file, asked for by name."""

    def __init__(self, file: Path, shapes: Mapping[str, tuple[int, ...]]):
        self.file, self._shapes = file, shapes

    def __contains__(self, name: str) -> bool:
        return name in self._shapes

    def of(self, name: str, *dims: int) -> tuple[int, ...]:
        """Returns a tensor's shape, of `dims` axes; UserError if it has another."""
        if name not in self._shapes:
            raise UserError(
                f"{one_line(self.file)}: misses {name}, which every Stable Diffusion "
                "of this kind has; the file is incomplete, or of another model"
            )
        shape = self._shapes[name]
        if len(shape) not in dims or 0 in shape:
            raise UserError(
                f"{one_line(self.file)}: {name} has shape {one_line(list(shape))}, "
                "which no Stable Diffusion has; the file is of another model"
            )
        return shape

    def count(self, pattern: str) -> int:
        """Returns how many of `pattern` with 0, 1, 2 ... in place of {} there are."""
        count = 0
        while pattern.format(count) in self:
            count += 1
        return count

    def width(self, name: str, unit: int, what: str) -> int:
        """Returns a tensor's first dimension, which must be a multiple of `unit`."""
        width = self.of(name, 1, 2, 4)[0]
        if width % unit:
            raise UserError(
                f"{one_line(self.file)}: {name} has {width} channels; must be a "
                f"multiple of {unit}, {what}, as in every Stable Diffusion"
            )
        return width


def _unet(of: _Shapes, published: Mapping[str, Any]) -> dict[str, Any]:
    widths, blocks, depths, layers = [], [], [], 0
    middle = f"{tensors.UNET}middle_block"
    attention = f"{middle}.1"
    for places in _stages(of):
        layers = layers or len(places)
        block = f"{tensors.UNET}input_blocks.{places[0]}"
        conv = f"{block}.0.out_layers.3.weight"
        widths.append(of.width(conv, _GROUPS, "the groups of its norms"))
        depth = _depth(of, f"{block}.1")
        if depth:
            attention = f"{block}.1"
        blocks.append("CrossAttnDownBlock2D" if depth else "DownBlock2D")
        depths.append(depth or 1)
    depths[-1] = _depth(of, f"{middle}.1") or depths[-1]
    channels = of.of(f"{tensors.UNET}input_blocks.0.0.weight", 4)[1]
    ends = of.of(f"{attention}.proj_in.weight", 2, 4)
    is_linear = len(ends) == 2
    text = of.of(f"{attention}.transformer_blocks.0.attn2.to_k.weight", 2)[1]
    result = {
        "block_out_channels": widths,
        "down_block_types": blocks,
        "up_block_types": [b.replace("Down", "Up") for b in reversed(blocks)],
        "layers_per_block": layers,
        "attention_head_dim": _heads(of, widths, is_linear),
        "cross_attention_dim": text,
        "in_channels": channels,
        "out_channels": of.of(f"{tensors.UNET}out.2.weight", 4)[0],
    }
    for key, value, default in (
        ("use_linear_projection", is_linear, False),
        ("transformer_layers_per_block", depths, [1] * len(depths)),
    ):
        if key in published or value != default:
            result[key] = value
    if f"{middle}.0.in_layers.0.weight" not in of:
        result["mid_block_type"] = None
    if "addition_embed_type" in published:
        label = of.of(f"{tensors.UNET}label_emb.0.0.weight", 2)
        result["projection_class_embeddings_input_dim"] = label[1]
    return result


def _stages(of: _Shapes) -> Iterator[list[int]]:
    """Yields the places of each resolution's layers among the input blocks."""
    places, place = [], 1
    block = f"{tensors.UNET}input_blocks"
    while True:
        if f"{block}.{place}.0.op.weight" in of and places:
            yield places
            places = []
        elif f"{block}.{place}.0.in_layers.0.weight" in of:
            places.append(place)
        else:
            break
        place += 1
    if not places:
        of.of(f"{block}.{place}.0.in_layers.0.weight", 1)  # which is missing
    yield places


def _depth(of: _Shapes, attention: str) -> int:
    return of.count(attention + ".transformer_blocks.{}.attn1.to_q.weight")


def _heads(of: _Shapes, widths: list[int], is_linear: bool) -> int | list[int]:
    """Returns the number of heads, which diffusers calls attention_head_dim."""
    if not is_linear:
        return _HEADS
    for width in widths:
        if width % _HEAD:
            raise UserError(
                f"{one_line(of.file)}: its UNet has {width} channels; must be a "
                f"multiple of {_HEAD}, the channels of a head, as in 2.x and XL"
            )
    return [width // _HEAD for width in widths]


def _vae(of: _Shapes) -> dict[str, Any]:
    down = f"{tensors.VAE}encoder.down"
    stages = of.count(down + ".{}.block.0.conv1.weight")
    if not stages:
        of.of(f"{down}.0.block.0.conv1.weight", 4)  # which is missing
    name, what = "{}.{}.block.0.conv1.weight", "the groups of its norms"
    return {
        "block_out_channels": [
            of.width(name.format(down, i), _GROUPS, what) for i in range(stages)
        ],
        "down_block_types": ["DownEncoderBlock2D"] * stages,
        "up_block_types": ["UpDecoderBlock2D"] * stages,
        "layers_per_block": of.count(down + ".0.block.{}.conv1.weight"),
        "latent_channels": of.of(f"{tensors.VAE}decoder.conv_in.weight", 4)[1],
    }


def _text(of: _Shapes, text: Text, *, is_pooled: bool, drops_last: bool) -> dict:
    prefix = text.prefix
    if text.is_open_clip:
        tokens, places = "token_embedding.weight", "positional_embedding"
        layer, inner = "transformer.resblocks.{}.ln_1.weight", "mlp.c_fc.weight"
        inner = f"transformer.resblocks.0.{inner}"
    else:
        tokens, places = (
            f"text_model.embeddings.{kind}_embedding.weight"
            for kind in ("token", "position")
        )
        layer = "text_model.encoder.layers.{}.layer_norm1.weight"
        inner = "text_model.encoder.layers.0.mlp.fc1.weight"
    rows, width = of.of(prefix + tokens, 2)
    of.width(f"{prefix}{layer.format(0)}", _HEAD, "the channels of a head")
    layers = of.count(prefix + layer)
    is_gelu = text.is_open_clip or width in _GELU_WIDTHS
    result = {
        "vocab_size": rows,
        "hidden_size": width,
        "intermediate_size": of.of(prefix + inner, 2)[0],
        "max_position_embeddings": of.of(prefix + places, 2)[0],
        "num_attention_heads": width // _HEAD,
        "num_hidden_layers": min(layers, LAYERS_USED) if drops_last else layers,
        "hidden_act": "gelu" if is_gelu else "quick_gelu",
    }
    if is_pooled:
        result["projection_dim"] = of.of(f"{prefix}text_projection", 2)[1]
    return result
