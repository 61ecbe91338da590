# SPDX-License-Identifier: Apache-2.0
"""The layers of Stable Diffusion 3's transformer (MMDiT), whose numbers are PyTorch's.

FLUX.1 has them too, with rotated queries and keys.

Axes: B batch, C channels, H height, W width, N positions of an image, L text tokens,
T the timestep's and pooled text's features.
"""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from gift_jax.models.ops.activations import ACTIVATIONS
from gift_jax.models.ops.kernels import Kernels
from gift_jax.models.ops.layers import Conv
from gift_jax.models.sd.layers import TimestepEmbedding, timestep_features

EPS = 1e-6  # of every norm
TIME_WIDTH = 256  # of a timestep's features
_MORE_FEATURES = 8  # of a head, of which kernels take multiples; two are used
GELU = ACTIVATIONS["gelu_pytorch_tanh"]


class RMSNorm(nn.Module):
    """x over the root mean square of its last axis, scaled; computed in float32.

    Attributes: dtype: of the result.
    Source: Zhang and Sennrich 2019 (arXiv:1910.07467), eq. 4; diffusers `RMSNorm`,
      transformers `T5LayerNorm`.
    """

    eps: float = EPS
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        x = x.astype(jnp.float32)
        mean_square = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
        y = x * jax.lax.rsqrt(mean_square + self.eps)
        scale = scale.astype(self.dtype).reshape((1,) * (x.ndim - 1) + (-1,))
        return y.astype(self.dtype) * scale


# --- inputs ---------------------------------------------------------------------------


def position_table(width: int, side: int, base: int):
    """Returns sines and cosines of the places in a square, float32 "1 side^2 width".

    Args: base: the sides of the images that it is made for: places lie that far apart.
    Source: diffusers `get_2d_sincos_pos_embed`.
    """
    frequency = 1e4 ** -(np.arange(width // 4) / (width / 4))
    place = np.arange(side, dtype=np.float32) / np.float32(side / base)
    phase = place.astype(np.float64)[:, None] * frequency
    wave = np.concatenate([np.sin(phase), np.cos(phase)], axis=1).astype(np.float32)
    shape = side, side, width // 2
    column = jnp.broadcast_to(wave[None], shape)
    row = jnp.broadcast_to(wave[:, None], shape)
    return jnp.concatenate([column, row], axis=-1).reshape(1, side * side, width)


def middle(table, height: int, width: int):
    """Returns the middle of a square table, "1 height width C" of "1 side side C"."""
    side = table.shape[1]
    top, left = (side - height) // 2, (side - width) // 2
    return table[:, top : top + height, left : left + width]


class PatchEmbed(nn.Module):
    """An image's patches with their places in the middle of a table.

    The table is part of the weights on disk, and never trained.

    Attributes: size: of a patch, in latents. table_side: patches that the table has
      along a side. base: see `position_table`.
    """

    width: int
    size: int
    table_side: int
    base: int
    dtype: Any = jnp.float32
    kernels: Kernels = Kernels()

    @nn.compact
    def __call__(self, z_BHWC):
        """Returns "B N C", N patches row by row.

        Raises: ValueError for latents of another size than the table has.
        """
        fields = self.width, self.size, self.size, 0, True, self.dtype, self.kernels
        x_BHWC = Conv(*fields, name="proj")(z_BHWC)
        B, H, W, C = x_BHWC.shape
        side = self.table_side
        whole = H * self.size, W * self.size
        if z_BHWC.shape[1:3] != whole or max(H, W) > side:
            raise ValueError(
                f"latents of {z_BHWC.shape[1]}x{z_BHWC.shape[2]}; must be multiples of "
                f"patch_size={self.size}, and at most {side * self.size}"
            )
        table = self.param("pos_embed", lambda _: position_table(C, side, self.base))
        places = middle(table.reshape(1, side, side, C), H, W)
        x_BHWC = (x_BHWC + places).astype(self.dtype)
        return x_BHWC.reshape(B, H * W, C)


def constant_features(value: float, width: int) -> np.ndarray:
    """Returns `timestep_features` of one large number, cosines first, "1 width".

    The last bit of a frequency, which PyTorch's exp rounds well, is 1e-4 of a feature.
    """
    half = width // 2
    exponent = np.float32(-math.log(1e4)) * np.arange(half, dtype=np.float32)
    frequency = np.exp((exponent / np.float32(half)).astype(np.float64))
    phase = np.float32(value) * frequency.astype(np.float32)
    return np.concatenate([np.cos(phase), np.sin(phase)])[None]


class TimeTextEmbed(nn.Module):
    """The timestep and the pooled text, added, "B T".

    Attributes: guidance: 1000 times the scale that a distilled model reads, or None.
    """

    width: int
    dtype: Any = jnp.float32
    guidance: float | None = None

    @nn.compact
    def __call__(self, t_B, pooled_BP):
        def embed(name):
            return TimestepEmbedding(self.width, self.dtype, name=name)

        features = timestep_features(t_B, TIME_WIDTH, True, 0)
        time_BT = embed("timestep_embedder")(features)
        if self.guidance is not None:
            features = constant_features(self.guidance, TIME_WIDTH)
            time_BT = time_BT + embed("guidance_embedder")(features)
        return time_BT + embed("text_embedder")(pooled_BP)


# --- the joint block ------------------------------------------------------------------


class Modulation(nn.Module):
    """Shifts, scales and gates of a norm and its layer, of the timestep: "B 1 C" each.

    Attributes: count: of them.
    """

    count: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, time_BT):
        width = self.count * time_BT.shape[-1]
        dense = nn.Dense(width, dtype=self.dtype, name="linear")
        return jnp.split(dense(nn.silu(time_BT))[:, None], self.count, axis=-1)


def normalize(x_BNC, kernels: Kernels):
    """Returns x normalized over channels, without parameters, in x's type."""
    width = x_BNC.shape[-1]
    one, zero = jnp.ones(width, jnp.float32), jnp.zeros(width, jnp.float32)
    y_BNC = kernels.layer_norm(x_BNC.astype(jnp.float32), one, zero, EPS)
    return y_BNC.astype(x_BNC.dtype)


def modulate(x_BNC, shift_B1C, scale_B1C):
    """Returns x (1 + scale) + shift."""
    return x_BNC * (1 + scale_B1C) + shift_B1C


def attend_repeated(kernels: Kernels, q_BNHD, k_BNHD, v_BNHD, repeats: int):
    """Returns attention to keys of which the last stands for so many equal ones.

    They weigh as much as one whose score is larger by log(repeats). Features of their
    own add that to it, so that every kernel takes them: 1 in all queries, in the last
    key what makes the score, in two parts, since 16 bits round it.

    Args: the last of N is a token of the text; of equal ones one is here.
    """
    (B, N, H, D), dtype = k_BNHD.shape, k_BNHD.dtype
    wide = D + _MORE_FEATURES
    score = math.log(repeats) * math.sqrt(wide)  # which kernels divide by that root
    high = np.asarray(score, dtype)
    parts_NF = np.zeros((N, _MORE_FEATURES), dtype)
    parts_NF[-1, :2] = high, score - float(high)
    ones_NF = np.zeros((N, _MORE_FEATURES), dtype)
    ones_NF[:, :2] = 1
    q = q_BNHD * dtype.type(math.sqrt(wide / D))

    def widened(a_BNHD, more_NF):
        shape = B, N, H, _MORE_FEATURES
        more = jnp.broadcast_to(more_NF[None, :, None], shape)
        return jnp.concatenate([a_BNHD, more], axis=-1)

    v = widened(v_BNHD, np.zeros_like(ones_NF))
    return kernels.attend(widened(q, ones_NF), widened(k_BNHD, parts_NF), v)[..., :D]


def rotations(height: int, width: int, length: int, axes: tuple[int, ...]):
    """Returns (cosines, sines) of places, row by row, and of text: float32 "N+L D/2".

    Args: height, width: tokens of an image. length: L. axes: features for each axis.
    Source: diffusers `FluxPosEmbed`, `FluxPipeline._prepare_latent_image_ids`.
    """
    places = np.zeros((height * width + length, 3))
    places[: height * width, 1:] = np.argwhere(np.ones((height, width)))
    phases = [
        places[:, [axis]] * 1e4 ** -(np.arange(0, size, 2) / size)
        for axis, size in enumerate(axes)
    ]
    phase = np.concatenate(phases, axis=1)
    return np.cos(phase).astype(np.float32), np.sin(phase).astype(np.float32)


def rotated(x_BNHD, rotary):
    """Returns queries or keys of which each pair of features is turned by its angle.

    Args: rotary: (cosines, sines), float32 "N D/2".
    Source: Su et al. 2021 (arXiv:2104.09864), eq. 34; diffusers `apply_rotary_emb`.
    """
    cos, sin = (jnp.asarray(a)[None, :, None] for a in rotary)
    even, odd = x_BNHD[..., ::2], x_BNHD[..., 1::2]
    turned = even * cos - odd * sin, odd * cos + even * sin
    return jnp.stack(turned, axis=-1).reshape(x_BNHD.shape).astype(x_BNHD.dtype)


class JointAttention(nn.Module):
    """Attention of image and text to both, or of an image to itself.

    Attributes: heads: of attention. qk_norm: whether queries and keys are normalized.
      text_output: whether the text's result is projected too; else nothing uses it.
      repeats: see `Transformer`. single: whether both have the image's projections, and
      neither's result is projected.
    Source: Esser et al. 2024 (arXiv:2403.03206), figure 2b; diffusers
      `JointAttnProcessor2_0`, `FluxAttnProcessor`.
    """

    heads: int
    qk_norm: bool = False
    text_output: bool = True
    repeats: int = 1
    dtype: Any = jnp.float32
    kernels: Kernels = Kernels()
    single: bool = False

    @nn.compact
    def __call__(self, x_BNC, c_BLC=None, rotary=None):
        """Returns (of the image "B N C", of the text "B L C"; L is 0 without text).

        Args: rotary: see `rotated`, of the image's places and then the text's.
        """
        B, N, C = x_BNC.shape
        if self.single and c_BLC is not None:
            x_BNC, c_BLC = jnp.concatenate([x_BNC, c_BLC], axis=1), None

        def dense(name):
            return nn.Dense(C, dtype=self.dtype, name=name)

        def project(x, names, norms):
            q, k, v = (
                dense(n)(x).reshape(B, -1, self.heads, C // self.heads) for n in names
            )
            if self.qk_norm:
                q, k = (
                    RMSNorm(EPS, self.dtype, name=name)(a)
                    for name, a in zip(norms, (q, k), strict=True)
                )
            return q, k, v

        parts = [project(x_BNC, ("to_q", "to_k", "to_v"), ("norm_q", "norm_k"))]
        if c_BLC is not None:
            names = ("add_q_proj", "add_k_proj", "add_v_proj")
            parts.append(project(c_BLC, names, ("norm_added_q", "norm_added_k")))
        q, k, v = (jnp.concatenate(a, axis=1) for a in zip(*parts, strict=True))
        if rotary is not None:
            q, k = rotated(q, rotary), rotated(k, rotary)
        if c_BLC is not None and self.repeats > 1:
            out = attend_repeated(self.kernels, q, k, v, self.repeats)
        else:
            out = self.kernels.attend(q, k, v)
        out = out.reshape(B, -1, C)
        image_BNC, text_BLC = out[:, :N], out[:, N:]
        if not self.single:
            image_BNC = dense("to_out_0")(image_BNC)
        if c_BLC is not None and self.text_output:
            text_BLC = dense("to_add_out")(text_BLC)
        return image_BNC, text_BLC


class Projection(nn.Module):
    """A dense layer and a GELU, approximated by a tanh."""

    width: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BNC):
        return GELU(nn.Dense(self.width, dtype=self.dtype, name="proj")(x_BNC))


class FeedForward(nn.Module):
    """Two dense layers, of each token by itself."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BNC):
        width = x_BNC.shape[-1]
        h = Projection(4 * width, self.dtype, name="net_0")(x_BNC)
        return nn.Dense(width, dtype=self.dtype, name="net_2")(h)


class JointBlock(nn.Module):
    """Joint attention and a feed-forward of each stream, modulated by the timestep.

    Attributes: heads, qk_norm, repeats: see `JointAttention`. dual: whether the image
      attends to itself besides, as in the first layers of SD 3.5 medium. is_last:
      whether the text is read for the last time, and left as it is.
    Source: Esser et al. 2024 (arXiv:2403.03206), figure 2b; diffusers
      `JointTransformerBlock`.
    """

    heads: int
    qk_norm: bool = False
    dual: bool = False
    is_last: bool = False
    repeats: int = 1
    dtype: Any = jnp.float32
    kernels: Kernels = Kernels()

    @nn.compact
    def __call__(self, x_BNC, c_BLC, time_BT, rotary=None):
        """Returns both streams, "B N C" and "B L C"; rotary: see `JointAttention`."""

        def modulation(count, name):
            return Modulation(count, self.dtype, name=name)(time_BT)

        def attention(name):
            fields = self.heads, self.qk_norm, not self.is_last, self.repeats
            return JointAttention(*fields, self.dtype, self.kernels, name=name)

        def feed_forward(name, x, shift, scale, gate):
            h = modulate(normalize(x, self.kernels), shift, scale)
            return x + gate * FeedForward(self.dtype, name=name)(h)

        shift, scale, gate, *others = modulation(9 if self.dual else 6, "norm1")
        mlp, second = others[:3], others[3:]
        text = modulation(2 if self.is_last else 6, "norm1_context")
        text_shift, text_scale = reversed(text) if self.is_last else text[:2]
        normal_BNC = normalize(x_BNC, self.kernels)
        image_BNC, text_BLC = attention("attn")(
            modulate(normal_BNC, shift, scale),
            modulate(normalize(c_BLC, self.kernels), text_shift, text_scale),
            rotary,
        )
        x_BNC = x_BNC + gate * image_BNC
        if self.dual:
            shift, scale, gate = second
            own_BNC, _ = attention("attn2")(modulate(normal_BNC, shift, scale))
            x_BNC = x_BNC + gate * own_BNC
        x_BNC = feed_forward("ff", x_BNC, *mlp)
        if self.is_last:
            return x_BNC, c_BLC
        gate, *mlp = text[2:]
        c_BLC = c_BLC + gate * text_BLC
        return x_BNC, feed_forward("ff_context", c_BLC, *mlp)


class SingleBlock(nn.Module):
    """Attention and a feed-forward side by side, of image and text as one: FLUX.1's.

    Source: diffusers `FluxSingleTransformerBlock`.
    """

    heads: int
    dtype: Any = jnp.float32
    kernels: Kernels = Kernels()

    @nn.compact
    def __call__(self, x_BNC, c_BLC, time_BT, rotary):
        """Returns both streams, "B N C" and "B L C"."""
        N, C = x_BNC.shape[1:]

        def dense(width, name):
            return nn.Dense(width, dtype=self.dtype, name=name)

        x = jnp.concatenate([x_BNC, c_BLC], axis=1)
        shift, scale, gate = Modulation(3, self.dtype, name="norm")(time_BT)
        h = modulate(normalize(x, self.kernels), shift, scale)
        fields = self.heads, True, False, 1, self.dtype, self.kernels, True
        attention = JointAttention(*fields, name="attn")
        parts = attention(h[:, :N], h[:, N:], rotary)
        wide = GELU(dense(4 * C, "proj_mlp")(h))
        h = jnp.concatenate([jnp.concatenate(parts, axis=1), wide], axis=-1)
        x = x + gate * dense(C, "proj_out")(h)
        return x[:, :N], x[:, N:]
