# SPDX-License-Identifier: Apache-2.0
"""Every tensor of a Stable Diffusion: its name in a model folder and in a single file.

A folder has the names of diffusers and transformers; a single file those of the code
that the models were trained with: CompVis's stable-diffusion, Stability AI's
generative-models and OpenCLIP.

Source: those repositories' modules; diffusers 0.42, loaders/single_file_utils.py.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

UNET = "model.diffusion_model."
VAE = "first_stage_model."
_UNET_DEFAULTS = {
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "transformer_layers_per_block": 1,
    "use_linear_projection": False,
}
THIRDS = ("query", "key", "value")  # of OpenCLIP's in_proj, in the order of its rows


class Tensor(NamedTuple):
    """One tensor in both layouts.

    Attributes: name: in its component of a model folder. original: in a single file.
      shape: in the folder. form: how the original differs: "" not at all; "conv": a
      linear layer that is a 1x1 convolution there; "transposed"; or of `THIRDS`, which
      third of the original's rows this is. optional: whether both may lack it.
    """

    name: str
    original: str
    shape: tuple[int, ...]
    form: str = ""
    optional: bool = False

    @property
    def original_shape(self) -> tuple[int, ...]:
        """The shape of the whole tensor in a single file."""
        if self.form == "conv":
            return (*self.shape, 1, 1)
        if self.form == "transposed":
            return self.shape[::-1]
        if self.form in THIRDS:
            return (3 * self.shape[0], *self.shape[1:])
        return self.shape


def _layer(name, original, *shape, form="") -> Iterator[Tensor]:
    """A weight of this shape, and its bias."""
    yield Tensor(f"{name}.weight", f"{original}.weight", shape, form)
    yield Tensor(f"{name}.bias", f"{original}.bias", shape[:1])


# --- UNet -----------------------------------------------------------------------------


def unet(config: Mapping[str, Any]) -> Iterator[Tensor]:
    """Yields a UNet's tensors.

    Args: config: has block_out_channels, down_block_types, layers_per_block,
      cross_attention_dim, in_channels and out_channels; and, where they are not
      diffusers' defaults, transformer_layers_per_block (a number or a list),
      use_linear_projection, mid_block_type, projection_class_embeddings_input_dim.
    """
    config = _UNET_DEFAULTS | dict(config)
    widths, layers = config["block_out_channels"], config["layers_per_block"]
    time, last = 4 * widths[0], len(widths) - 1
    attends = [kind.startswith("CrossAttn") for kind in config["down_block_types"]]
    depths = per_stage(config["transformer_layers_per_block"], len(widths))
    yield from _layer("time_embedding.linear_1", f"{UNET}time_embed.0", time, widths[0])
    yield from _layer("time_embedding.linear_2", f"{UNET}time_embed.2", time, time)
    added = config.get("projection_class_embeddings_input_dim")
    if added:
        yield from _layer("add_embedding.linear_1", f"{UNET}label_emb.0.0", time, added)
        yield from _layer("add_embedding.linear_2", f"{UNET}label_emb.0.2", time, time)
    original = f"{UNET}input_blocks.0.0"
    yield from _layer("conv_in", original, widths[0], config["in_channels"], 3, 3)
    inner, skips, place = widths[0], [widths[0]], 1
    for stage, outer in enumerate(widths):
        block = f"down_blocks.{stage}"
        for layer in range(layers):
            original = f"{UNET}input_blocks.{place}"
            name = f"{block}.resnets.{layer}"
            yield from _unet_resnet(name, f"{original}.0", inner, outer, time)
            if attends[stage]:
                name = f"{block}.attentions.{layer}"
                yield from _attention(
                    name, f"{original}.1", outer, depths[stage], config
                )
            inner, place = outer, place + 1
            skips.append(outer)
        if stage < last:
            original = f"{UNET}input_blocks.{place}.0.op"
            name = f"{block}.downsamplers.0.conv"
            yield from _layer(name, original, outer, outer, 3, 3)
            place += 1
            skips.append(outer)
    if config["mid_block_type"]:
        yield from _unet_middle(inner, time, depths[-1], config)
    place = 0
    for stage, outer in enumerate(reversed(widths)):
        block, attention = f"up_blocks.{stage}", attends[last - stage]
        for layer in range(layers + 1):
            original = f"{UNET}output_blocks.{place}"
            name = f"{block}.resnets.{layer}"
            width = inner + skips.pop()
            yield from _unet_resnet(name, f"{original}.0", width, outer, time)
            if attention:
                name = f"{block}.attentions.{layer}"
                depth = depths[last - stage]
                yield from _attention(name, f"{original}.1", outer, depth, config)
            if layer == layers and stage < last:
                name = f"{block}.upsamplers.0.conv"
                original = f"{original}.{2 if attention else 1}.conv"
                yield from _layer(name, original, outer, outer, 3, 3)
            inner, place = outer, place + 1
    yield from _layer("conv_norm_out", f"{UNET}out.0", inner)
    yield from _layer("conv_out", f"{UNET}out.2", config["out_channels"], inner, 3, 3)


def per_stage(value: Any, stages: int) -> list:
    """Returns a config's value for each resolution, given it or one for all."""
    return list(value) if isinstance(value, (list, tuple)) else [value] * stages


def _unet_middle(width, time, depth, config):
    middle = f"{UNET}middle_block"
    for layer, place in enumerate((0, 2)):
        name = f"mid_block.resnets.{layer}"
        yield from _unet_resnet(name, f"{middle}.{place}", width, width, time)
    if config["mid_block_type"] == "UNetMidBlock2DCrossAttn":
        name = "mid_block.attentions.0"
        yield from _attention(name, f"{middle}.1", width, depth, config)


def _unet_resnet(name, original, inner, outer, time):
    yield from _layer(f"{name}.norm1", f"{original}.in_layers.0", inner)
    yield from _layer(f"{name}.conv1", f"{original}.in_layers.2", outer, inner, 3, 3)
    yield from _layer(f"{name}.time_emb_proj", f"{original}.emb_layers.1", outer, time)
    yield from _layer(f"{name}.norm2", f"{original}.out_layers.0", outer)
    yield from _layer(f"{name}.conv2", f"{original}.out_layers.3", outer, outer, 3, 3)
    if inner != outer:
        yield from _layer(
            f"{name}.conv_shortcut", f"{original}.skip_connection", outer, inner, 1, 1
        )


def _attention(name, original, width, depth, config):
    """A stack of transformer blocks, whose names are the same in both layouts."""
    ends = () if config["use_linear_projection"] else (1, 1)
    shapes = {"norm": (width,), "proj_in": (width, width, *ends)}
    text = config["cross_attention_dim"]
    for i in range(depth):
        block = f"transformer_blocks.{i}"
        for attention, states in (("attn1", width), ("attn2", text)):
            at = f"{block}.{attention}"
            yield from _plain(name, original, f"{at}.to_q.weight", width, width)
            yield from _plain(name, original, f"{at}.to_k.weight", width, states)
            yield from _plain(name, original, f"{at}.to_v.weight", width, states)
            shapes[f"{at}.to_out.0"] = (width, width)
        shapes[f"{block}.ff.net.0.proj"] = (8 * width, width)
        shapes[f"{block}.ff.net.2"] = (width, 4 * width)
        shapes |= {f"{block}.norm{n}": (width,) for n in (1, 2, 3)}
    shapes["proj_out"] = (width, width, *ends)
    for part, shape in shapes.items():
        yield from _layer(f"{name}.{part}", f"{original}.{part}", *shape)


def _plain(name, original, part, *shape):
    yield Tensor(f"{name}.{part}", f"{original}.{part}", shape)


# --- VAE ------------------------------------------------------------------------------


def vae(config: Mapping[str, Any]) -> Iterator[Tensor]:
    """Yields a VAE's tensors.

    Args: config: has block_out_channels, layers_per_block and latent_channels.
    """
    widths, layers = config["block_out_channels"], config["layers_per_block"]
    latents, last, top = config["latent_channels"], len(widths) - 1, widths[-1]
    coder = f"{VAE}encoder"
    yield from _layer("encoder.conv_in", f"{coder}.conv_in", widths[0], 3, 3, 3)
    inner = widths[0]
    for stage, outer in enumerate(widths):
        name, original = f"encoder.down_blocks.{stage}", f"{coder}.down.{stage}"
        for layer in range(layers):
            yield from _vae_resnet(
                f"{name}.resnets.{layer}", f"{original}.block.{layer}", inner, outer
            )
            inner = outer
        if stage < last:
            name, original = f"{name}.downsamplers.0.conv", f"{original}.downsample"
            yield from _layer(name, f"{original}.conv", outer, outer, 3, 3)
    yield from _vae_middle("encoder", top)
    yield from _layer("encoder.conv_norm_out", f"{coder}.norm_out", top)
    yield from _layer("encoder.conv_out", f"{coder}.conv_out", 2 * latents, top, 3, 3)
    both = 2 * latents
    yield from _layer("quant_conv", f"{VAE}quant_conv", both, both, 1, 1)
    yield from _layer(
        "post_quant_conv", f"{VAE}post_quant_conv", latents, latents, 1, 1
    )
    coder = f"{VAE}decoder"
    yield from _layer("decoder.conv_in", f"{coder}.conv_in", top, latents, 3, 3)
    yield from _vae_middle("decoder", top)
    inner = top
    for stage, outer in enumerate(reversed(widths)):
        name, original = f"decoder.up_blocks.{stage}", f"{coder}.up.{last - stage}"
        for layer in range(layers + 1):
            yield from _vae_resnet(
                f"{name}.resnets.{layer}", f"{original}.block.{layer}", inner, outer
            )
            inner = outer
        if stage < last:
            name, original = f"{name}.upsamplers.0.conv", f"{original}.upsample"
            yield from _layer(name, f"{original}.conv", outer, outer, 3, 3)
    yield from _layer("decoder.conv_norm_out", f"{coder}.norm_out", inner)
    yield from _layer("decoder.conv_out", f"{coder}.conv_out", 3, inner, 3, 3)


def _vae_middle(coder, width):
    name, original = f"{coder}.mid_block", f"{VAE}{coder}.mid"
    for i in (0, 1):
        block = f"{original}.block_{i + 1}"
        yield from _vae_resnet(f"{name}.resnets.{i}", block, width, width)
    name, original = f"{name}.attentions.0", f"{original}.attn_1"
    yield from _layer(f"{name}.group_norm", f"{original}.norm", width)
    for part, old in (("to_q", "q"), ("to_k", "k"), ("to_v", "v")):
        yield from _layer(
            f"{name}.{part}", f"{original}.{old}", width, width, form="conv"
        )
    yield from _layer(
        f"{name}.to_out.0", f"{original}.proj_out", width, width, form="conv"
    )


def _vae_resnet(name, original, inner, outer):
    yield from _layer(f"{name}.norm1", f"{original}.norm1", inner)
    yield from _layer(f"{name}.conv1", f"{original}.conv1", outer, inner, 3, 3)
    yield from _layer(f"{name}.norm2", f"{original}.norm2", outer)
    yield from _layer(f"{name}.conv2", f"{original}.conv2", outer, outer, 3, 3)
    if inner != outer:
        yield from _layer(
            f"{name}.conv_shortcut", f"{original}.nin_shortcut", outer, inner, 1, 1
        )


# --- text encoders --------------------------------------------------------------------

_CLIP_PARTS = {  # of a layer: of OpenCLIP
    "layer_norm1": "ln_1",
    "self_attn.out_proj": "attn.out_proj",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
_IN_PROJ = (("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value"))


def clip(config: Mapping[str, Any], prefix: str) -> Iterator[Tensor]:
    """Yields the tensors of a text encoder whose file has transformers' names.

    Args: config: has hidden_size, intermediate_size, num_hidden_layers, vocab_size and
      max_position_embeddings. prefix: of the names in the file.
    """
    for tensor in open_clip(config, "", projection=False):
        yield Tensor(tensor.name, prefix + tensor.name, tensor.shape)
    name = "text_model.embeddings.position_ids"
    shape = (1, config["max_position_embeddings"])
    yield Tensor(name, prefix + name, shape, optional=True)


def open_clip(
    config: Mapping[str, Any], prefix: str, *, projection: bool
) -> Iterator[Tensor]:
    """Yields the tensors of a text encoder whose file has OpenCLIP's names.

    Args: config: see `clip`, with projection_dim. projection: whether the folder has
      the projection of the pooled state.
    """
    width, inner = config["hidden_size"], config["intermediate_size"]
    name = "text_model.embeddings"
    for part, original, rows in (
        ("token_embedding", "token_embedding.weight", "vocab_size"),
        ("position_embedding", "positional_embedding", "max_position_embeddings"),
    ):
        shape = (config[rows], width)
        yield Tensor(f"{name}.{part}.weight", prefix + original, shape)
    shapes = {"mlp.fc1": (inner, width), "mlp.fc2": (width, inner)}
    shapes["self_attn.out_proj"] = (width, width)
    for i in range(config["num_hidden_layers"]):
        name = f"text_model.encoder.layers.{i}"
        original = f"{prefix}transformer.resblocks.{i}"
        for part, form in _IN_PROJ:
            at, whole = f"{name}.self_attn.{part}", f"{original}.attn.in_proj"
            yield Tensor(f"{at}.weight", f"{whole}_weight", (width, width), form)
            yield Tensor(f"{at}.bias", f"{whole}_bias", (width,), form)
        for part, old in _CLIP_PARTS.items():
            shape = shapes.get(part, (width,))
            yield from _layer(f"{name}.{part}", f"{original}.{old}", *shape)
    name = "text_model.final_layer_norm"
    yield from _layer(name, f"{prefix}ln_final", width)
    if projection:
        shape, form = (config["projection_dim"], width), "transposed"
        yield Tensor("text_projection.weight", f"{prefix}text_projection", shape, form)
