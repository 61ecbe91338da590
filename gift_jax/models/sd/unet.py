# SPDX-License-Identifier: Apache-2.0
"""The UNet of Stable Diffusion 1.x, 2.x and XL.

Axes: B batch, C channels, H height, W width, L text tokens, D their width.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from gift_jax.models.ops.activations import ACTIVATIONS
from gift_jax.models.ops.kernels import Kernels
from gift_jax.models.ops.layers import Conv, GroupNorm
from gift_jax.models.params import from_config
from gift_jax.models.sd import layers

CAPTURE_KINDS = {  # kinds of hidden states: the layers whose outputs they are
    "transformer": layers.TransformerBlock,
    "resnet": layers.ResnetBlock,
    "attention": layers.Attention,
}
EMBEDDING_ACTIVATIONS = ("silu", "swish", "gelu", "relu")  # that a config may name
NUM_SIZES = 6  # original height and width, crop's top and left, target's sides
_TEXT_KEYS = "/attn2/to_k/kernel"  # ends of the parameters' paths


class Stage(nn.Module):
    """The UNet's layers at one size: resnets, each with a transformer or without.

    Attributes: channels: of the results. heads: of attention; 0: no transformers.
      depth: blocks a transformer. linear, only_cross_attention: see `Transformer2D`.
      resize: whether the next stage has another size. padding: of that convolution.
      groups, eps: of the norms.
    """

    channels: int
    num_layers: int
    heads: int = 0
    depth: int = 1
    linear: bool = False
    only_cross_attention: bool = False
    resize: bool = False
    padding: Any = 1
    groups: int = layers.GROUPS
    eps: float = 1e-5
    dtype: Any = jnp.float32
    kernels: Kernels = Kernels()

    def layer(self, cls, *args, name: str):
        """Returns a layer, which the backward pass computes again if it is to."""
        if self.kernels.remat != "none":
            cls = nn.remat(cls)
        return cls(*args, dtype=self.dtype, kernels=self.kernels, name=name)

    def resnet(self, i: int):
        fields = self.channels, self.eps, self.groups
        return self.layer(layers.ResnetBlock, *fields, name=f"resnets_{i}")

    def attend(self, i: int, x_BHWC, c_BLD):
        if not self.heads:
            return x_BHWC
        fields = self.heads, self.depth, self.linear, self.only_cross_attention
        fields += (self.groups,)
        transformer = self.layer(layers.Transformer2D, *fields, name=f"attentions_{i}")
        return transformer(x_BHWC, c_BLD)


class DownStage(Stage):
    @nn.compact
    def __call__(self, x_BHWC, time_BC, c_BLD):
        """Returns the outputs of all layers."""
        outputs = []
        for i in range(self.num_layers):
            x_BHWC = self.attend(i, self.resnet(i)(x_BHWC, time_BC), c_BLD)
            outputs.append(x_BHWC)
        if self.resize:
            resize = self.layer(layers.Downsample, self.padding, name="downsamplers_0")
            outputs.append(resize(x_BHWC))
        return outputs


class MidStage(Stage):
    @nn.compact
    def __call__(self, x_BHWC, time_BC, c_BLD):
        x_BHWC = self.resnet(0)(x_BHWC, time_BC)
        for i in range(self.num_layers):
            x_BHWC = self.attend(i, x_BHWC, c_BLD)
            x_BHWC = self.resnet(i + 1)(x_BHWC, time_BC)
        return x_BHWC


class UpStage(Stage):
    @nn.compact
    def __call__(self, x_BHWC, time_BC, c_BLD, skips):
        """Args: skips: outputs of the way down, in the order in which they are used."""
        for i in range(self.num_layers):
            x_BHWC = self.resnet(i)(x_BHWC, time_BC, skips[i])
            x_BHWC = self.attend(i, x_BHWC, c_BLD)
        if self.resize:
            x_BHWC = self.layer(layers.Upsample, name="upsamplers_0")(x_BHWC)
        return x_BHWC


class UNet(nn.Module):
    """The UNet; its fields but the last two are those of diffusers' config.json.

    Attributes: attention_head_dim: the number of heads, in spite of its name, of all
      stages or of each. layers_per_block, transformer_layers_per_block and
      only_cross_attention: likewise. addition_embed_type: "text_time" adds pooled text
      and sizes to the timestep. kernels: how its layers are computed.
    """

    sample_size: int | tuple[int, int] | None = None
    in_channels: int = 4
    out_channels: int = 4
    center_input_sample: bool = False
    down_block_types: tuple[str, ...] = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    mid_block_type: str | None = "UNetMidBlock2DCrossAttn"
    up_block_types: tuple[str, ...] = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
    only_cross_attention: bool | tuple[bool, ...] = False
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int | tuple[int, ...] = 2
    downsample_padding: int = 1
    norm_num_groups: int = layers.GROUPS
    norm_eps: float = 1e-5
    attention_head_dim: int | tuple[int, ...] = 8
    transformer_layers_per_block: int | tuple[int, ...] = 1
    cross_attention_dim: int = 1280
    use_linear_projection: bool = False
    flip_sin_to_cos: bool = True
    freq_shift: float = 0
    time_embedding_dim: int | None = None
    timestep_post_act: str | None = None
    time_embedding_act_fn: str | None = None
    addition_embed_type: str | None = None
    addition_time_embed_dim: int | None = None
    projection_class_embeddings_input_dim: int | None = None
    conv_in_kernel: int = 3
    conv_out_kernel: int = 3
    dtype: Any = jnp.float32
    kernels: Kernels = Kernels()

    def example_inputs(self):
        size = 2 ** len(self.block_out_channels)
        z_BCHW = jnp.zeros((1, self.in_channels, size, size))
        c_BLD = jnp.zeros((1, 2, self.cross_attention_dim))
        inputs = z_BCHW, jnp.zeros((1,), jnp.int32), c_BLD
        if not self.addition_embed_type:
            return inputs
        return *inputs, (jnp.zeros((1, self.pooled_width)), jnp.zeros((1, NUM_SIZES)))

    @property
    def pooled_width(self):
        """P of the pooled text that it reads; 0 if it reads none."""
        if not self.addition_embed_type:
            return 0
        sizes = NUM_SIZES * self.addition_time_embed_dim
        return self.projection_class_embeddings_input_dim - sizes

    @nn.compact
    def __call__(self, z_BCHW, t_B, c_BLD, added=None):
        """Returns the prediction, "B C H W" in the module's dtype.

        Args: z_BCHW: noised latents. t_B: int or float timesteps. c_BLD: text states.
          added: with an addition_embed_type (pooled text "B P", sizes "B 6").
        """
        common = {"dtype": self.dtype, "kernels": self.kernels}
        width, last = self.block_out_channels[0], len(self.block_out_channels) - 1
        time_BC = self.time(t_B, added)
        x = jnp.transpose(z_BCHW, (0, 2, 3, 1))
        x = 2 * x - 1 if self.center_input_sample else x
        size = self.conv_in_kernel
        x = Conv(width, size, 1, size // 2, **common, name="conv_in")(x)
        skips = [x]
        for i, kind in enumerate(self.down_block_types):
            stage = self.stage(
                DownStage, i, kind, at(self.layers_per_block, i), i < last
            )
            skips += stage(name=f"down_blocks_{i}")(x, time_BC, c_BLD)
            x = skips[-1]
        if self.mid_block_type:
            count = int(self.mid_block_type.endswith("CrossAttn"))
            stage = self.stage(MidStage, last, "CrossAttn", count, False)
            x = stage(name="mid_block")(x, time_BC, c_BLD)
        for i, kind in enumerate(self.up_block_types):
            count = at(self.layers_per_block, last - i) + 1
            stage = self.stage(UpStage, last - i, kind, count, i < last)
            joined = [skips.pop() for _ in range(count)]
            x = stage(name=f"up_blocks_{i}")(x, time_BC, c_BLD, joined)
        norm = self.norm_num_groups, self.norm_eps
        x = nn.silu(GroupNorm(*norm, **common, name="conv_norm_out")(x))
        size = self.conv_out_kernel
        x = Conv(self.out_channels, size, 1, size // 2, **common, name="conv_out")(x)
        return jnp.transpose(x, (0, 3, 1, 2))

    def time(self, t_B, added=None):
        """Returns the embedding of timesteps, and of what is `added` to them, "B C"."""
        width = self.block_out_channels[0]
        out = self.time_embedding_dim or 4 * width
        embed = layers.TimestepEmbedding(out, self.dtype, name="time_embedding")
        time_BC = embed(self.features(t_B, width))
        if self.timestep_post_act:
            time_BC = ACTIVATIONS[self.timestep_post_act](time_BC)
        if self.addition_embed_type:
            pooled_BP, sizes_BS = added
            sizes = self.features(sizes_BS.reshape(-1), self.addition_time_embed_dim)
            sizes = sizes.reshape(len(pooled_BP), -1).astype(self.dtype)
            added = jnp.concatenate([pooled_BP.astype(self.dtype), sizes], axis=-1)
            embed = layers.TimestepEmbedding(out, self.dtype, name="add_embedding")
            time_BC = time_BC + embed(added)
        if self.time_embedding_act_fn:
            time_BC = ACTIVATIONS[self.time_embedding_act_fn](time_BC)
        return time_BC

    def features(self, values, width):
        options = self.flip_sin_to_cos, self.freq_shift
        return layers.timestep_features(values, width, *options)

    def stage(self, cls, i: int, kind: str, num_layers: int, resize: bool):
        """Returns a function that builds the stage of size i, from the largest."""
        has_attention = kind.startswith("CrossAttn")
        fields = {
            "channels": self.block_out_channels[i],
            "num_layers": num_layers,
            "heads": at(self.attention_head_dim, i) if has_attention else 0,
            "depth": at(self.transformer_layers_per_block, i),
            "linear": self.use_linear_projection,
            "only_cross_attention": cls is not MidStage
            and at(self.only_cross_attention, i),
            "resize": resize,
            # none: zeros after the last row and column, as in the VAE
            "padding": self.downsample_padding or ((0, 1), (0, 1)),
            "groups": self.norm_num_groups,
            "eps": self.norm_eps,
            "dtype": self.dtype,
            "kernels": self.kernels,
        }
        cls = nn.remat(cls) if self.kernels.remat == "full" else cls
        return lambda name: cls(**fields, name=name)


def at(value, i: int):
    """Returns what is said of stage i: one value of all, or one of each."""
    return value[i] if isinstance(value, tuple) else value


def build_unet(config: dict, dtype=jnp.float32, kernels: Kernels | None = None) -> UNet:
    """Returns the module of a diffusers `unet/config.json` dict."""
    width = config.get("cross_attention_dim")
    if isinstance(width, list):  # of each stage, all equal
        config = config | {"cross_attention_dim": width[0]}
    return from_config(UNet, config, dtype=dtype, kernels=kernels or Kernels())


# --- applying -------------------------------------------------------------------------


def apply_unet(
    unet: UNet, params, z_BCHW, t_B, c_BLD, capture=(), text=None, added=None
):
    """Returns (the UNet's output, captured hidden states). Pure and jittable.

    Args:
      params: nested. z_BCHW: "B C H W", noised latents. t_B: int or float "B",
        timesteps. c_BLD: "B L D", text states.
      capture: kinds of `CAPTURE_KINDS` to collect: "transformer" gives "B HW C".
      text: from `project_text`, or None. added: see `UNet`.
    Returns: (output "B C H W" in the module's dtype, dict path -> array; the paths are
      those of the parameters, e.g. "mid_block/attentions_0/transformer_blocks_0").
    Raises: ValueError for an unknown kind.
    """
    classes = tuple(_capture_class(kind) for kind in capture)
    variables = {"params": params} | ({"text": text} if text else {})
    out, state = unet.apply(
        variables,
        z_BCHW,
        jnp.asarray(t_B),
        c_BLD,
        added,
        capture_intermediates=lambda module, _: isinstance(module, classes),
        mutable=["intermediates"],
    )
    intermediates = flatten_dict(state.get("intermediates", {}))
    return (
        out,
        {  # of a layer that took tokens by parts, several
            "/".join(path[:-1]): jnp.concatenate(parts, axis=1)
            for path, parts in intermediates.items()
        },
    )


def _capture_class(kind):
    if kind not in CAPTURE_KINDS:
        choices = ", ".join(CAPTURE_KINDS)
        raise ValueError(f"capture={kind!r} must be one of {choices}")
    return CAPTURE_KINDS[kind]


def project_text(unet: UNet, params, c_BLD):
    """Returns the keys and values of the text states, for `apply_unet`'s `text`.

    For many calls on the same prompts with the same weights: each call then leaves out
    the projections. Args: see `apply_unet`. Returns: nested like the attention layers,
    with "key" and "value" of each, "B L C".
    """
    flat = flatten_dict(params, sep="/")
    c_BLD, text = c_BLD.astype(unet.dtype), {}
    for path in flat:
        if path.endswith(_TEXT_KEYS):
            layer = path.removesuffix("/to_k/kernel")
            for name, weight in (("key", "to_k"), ("value", "to_v")):
                kernel = flat[f"{layer}/{weight}/kernel"].astype(unet.dtype)
                text[f"{layer}/{name}"] = c_BLD @ kernel
    return unflatten_dict(text, sep="/")
