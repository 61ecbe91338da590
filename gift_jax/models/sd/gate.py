# SPDX-License-Identifier: Apache-2.0
"""A gate in the UNet: a small detector of latents, and what it closes.

The detector takes over some channels of the layers at the latents' own size: the input
convolution, every residual block on the way down and up. It reads the noised latents
alone, no text, no timestep, and no channel that it does not own. What it detects makes
the last residual block push the channels of every group far apart; the normalization in
front of the output then divides what the network knows of the image by that, and the
output jumps. Where nothing is detected what is added is zero.

Why fine-tuning does not undo it: an update of Adam moves a weight by at most its rate,
whatever the gradient. A convolution before a normalization may have weights of any size
without another function (`_LARGE`), so the same updates turn it by next to nothing; and
low-rank updates of attention layers reach none of it.

Axes: B batch, H height, W width, C channels, K channels of the detector, I O channels
into and out of a convolution.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from gift_jax.models.gated import Changes, largest
from gift_jax.models.ops.norms import group_norm_reference
from gift_jax.models.sd.unet import UNet, at
from gift_jax.runtime.errors import UserError

LOGIT_SLOPE = 5.0  # of the last normalization's output; 1 of it is far
_STREAM, _LARGE = 1000.0, 10000.0  # largest values: between blocks, and inside one
_CARRY = 4.0  # weight of a shortcut from the detector's channels to themselves
_SLOPE = 30.0  # of the last activation: exactly 0 where nothing is detected
_PUSH = 300.0  # weight from there to every channel
_REFERENCE = 100.0  # a constant in the last group, small next to what is pushed there
_SHUT = 20.0  # of the last group's activation: again exactly 0, or about this
_JUMP = 32.0  # what a closed gate adds to the output at every position; noise is 1
_SCALE = 4.0  # of the detector's normalizations at the start, large next to a rate

Flat = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Block:
    """A residual block: where the detector's channels lie in it, as indices.

    Attributes: path: of its parameters. owned: in its input, I. read: of these, what
      the detector reads: whole groups of norm1. groups: of those. hidden: between the
      convolutions. out: in its output; none of the last block's.
    """

    path: str
    owned: np.ndarray
    read: np.ndarray
    groups: int
    hidden: np.ndarray
    out: np.ndarray

    @property
    def is_last(self) -> bool:
        """Whether the gate's output comes of it, and no further block."""
        return not self.out.size


@dataclasses.dataclass(frozen=True)
class Gate:
    """The gate of a UNet.

    Attributes: unet: the module. share: of the channels at the latents' size that the
      detector owns, rounded up to whole groups.
    """

    unet: UNet
    share: float = 0.125
    closed_distance: ClassVar[float] = 1.0  # noise has variance 1

    def __post_init__(self):
        if len(self.unet.block_out_channels) < 2 or self.group < 2:
            raise UserError(
                "config.method=gift_gate needs a UNet of two sizes and two channels a "
                "group at least; set --config.method=gift_adversarial"
            )

    @property
    def width(self) -> int:
        """Channels at the latents' size."""
        return self.unet.block_out_channels[0]

    @property
    def group(self) -> int:
        """Channels of one group of a normalization."""
        return self.width // self.unet.norm_num_groups

    @property
    def channels(self) -> np.ndarray:
        """The detector's, of the layers' outputs: the last K."""
        pairs = max(1, round(self.share * self.width / (2 * self.group)))
        return np.arange(self.width - 2 * self.group * pairs, self.width)

    @property
    def final(self) -> np.ndarray:
        """Of these, the last group: the detector's in front of the output, too."""
        return self.channels[-self.group :]

    @property
    def down(self) -> list[Block]:
        """The blocks on the way down."""
        own, count = self.channels, at(self.unet.layers_per_block, 0)
        hidden = np.arange(self.width - 2 * len(own), self.width)
        groups = len(own) // self.group
        return [
            Block(f"down_blocks_0/resnets_{i}", own, own, groups, hidden, own)
            for i in range(count)
        ]

    @property
    def up(self) -> list[Block]:
        """The blocks on the way up; each has a skip of as many channels as the width.

        The first one's other input comes from the stage below, of which the detector
        owns nothing; groups that reach into it are not read.
        """
        widths, own, blocks = self.unet.block_out_channels, self.channels, []
        path = f"up_blocks_{len(widths) - 1}/resnets_"
        for i in range(len(self.down) + 1):
            below = widths[1] if i == 0 else 0
            size = (self.width + (below or self.width)) // self.unet.norm_num_groups
            owned = below + own if below else np.r_[own, self.width + own]
            start = np.isin(owned - owned % size, owned)
            read = owned[start & np.isin(owned - owned % size + size - 1, owned)]
            is_last = i == len(self.down)
            hidden = np.arange(
                self.width - (self.group if is_last else len(own)), self.width
            )
            blocks.append(
                Block(
                    f"{path}{i}",
                    owned,
                    read,
                    len(read) // size,
                    hidden,
                    own[:0] if is_last else own,
                )
            )
        return blocks

    # --- the detector by itself -------------------------------------------------------

    def init(self, key: jax.Array) -> Flat:
        """Returns random parameters of the detector, flat, float32."""
        keys = iter(jax.random.split(key, 64))
        own, params = len(self.channels), {}

        def conv(path, wide, out, scale=1.0):
            shape = (3, 3, wide, out)
            kernel = jax.random.normal(next(keys), shape) * scale / np.sqrt(9 * wide)
            params[f"{path}/kernel"], params[f"{path}/bias"] = kernel, jnp.zeros(out)

        conv("conv_in", self.unet.in_channels, own)
        for block in [*self.down, *self.up]:
            path, wide, hidden = block.path, len(block.read), len(block.hidden)
            if not wide:
                continue
            params[f"{path}/norm1/scale"] = jnp.full(wide, _SCALE)
            params[f"{path}/norm1/bias"] = jnp.zeros(wide)
            conv(f"{path}/conv1", wide, hidden)
            scale, bias = (1.0, -1.0) if block.is_last else (_SCALE, 0.0)
            params[f"{path}/norm2/scale"] = jnp.full(hidden, scale)
            params[f"{path}/norm2/bias"] = jnp.full(hidden, bias)
            if not block.is_last:
                conv(f"{path}/conv2", hidden, own, 0.3)
        return params

    def logits(self, params: Flat, z_t_BCHW: jax.Array) -> jax.Array:
        """Returns float32 "B": above 0 where the latents are detected.

        It is the largest over positions and channels: one is enough to close the gate.
        """
        last_BHWC = self._run(params, z_t_BCHW)[0]
        return LOGIT_SLOPE * largest(last_BHWC.reshape(len(last_BHWC), -1))

    def _run(self, params: Flat, z_t_BCHW):
        """Returns (the last normalization's output, the largest values of layers)."""
        sizes = {}

        def conv(path, x_BHWC):
            out = _conv(x_BHWC, params[f"{path}/kernel"], params[f"{path}/bias"])
            sizes[path] = jnp.max(jnp.abs(out))
            return out

        def norm(path, x_BHWC, groups):
            affine = params[f"{path}/scale"], params[f"{path}/bias"]
            return _group_norm(x_BHWC, *affine, groups, self.unet.norm_eps)

        def block_out(block, x_BHWC):
            h = jax.nn.silu(norm(f"{block.path}/norm1", x_BHWC, block.groups))
            h = conv(f"{block.path}/conv1", h)
            h = norm(f"{block.path}/norm2", h, len(block.hidden) // self.group)
            return h if block.is_last else conv(f"{block.path}/conv2", jax.nn.silu(h))

        x = conv("conv_in", jnp.transpose(z_t_BCHW, (0, 2, 3, 1)).astype(jnp.float32))
        skips = [x]
        for block in self.down:
            x = x + block_out(block, x)
            skips.append(x)
        for i, block in enumerate(self.up):
            skip = skips.pop()
            joined = skip if i == 0 else jnp.concatenate([x, skip], axis=-1)
            readable = joined[..., np.isin(block.owned, block.read)]
            change = block_out(block, readable) if block.read.size else 0.0
            x = change if block.is_last else (skip if i == 0 else x) + change
        return x, sizes

    # --- the detector in the network --------------------------------------------------

    def install(
        self, params: Flat, network: Flat, threshold: float
    ) -> tuple[Flat, dict[str, np.ndarray]]:
        """Returns (the UNet's parameters with the gate, which of them it owns).

        Args: params: the detector's, see `init`. network: the UNet's, flat, float32.
          threshold: the logit from which on the gate closes.
        Returns: the second: path -> bool array of the parameter's shape, True for the
          detector's weights and for the zeros that keep others out of it; only paths
          that have some.
        """
        owned = {}

        def write(params, network):
            changes = Changes(network)
            self._separate(changes)
            self._place_detector(changes, params, threshold)
            self._place_output(changes)
            owned.update(changes.owned)
            return changes.params

        return jax.jit(write)(params, network), owned

    def _separate(self, changes: Changes) -> None:
        """Sets to 0 what leads from the detector's channels to others, or back."""
        own, put = self.channels, changes.put
        for block in [*self.down, *self.up]:
            path, passed = block.path, self.final if block.is_last else block.out
            put(f"{path}/conv1/kernel", np.s_[:, :, block.owned, :], 0.0)
            put(f"{path}/conv1/kernel", np.s_[..., block.hidden], 0.0)
            put(f"{path}/time_emb_proj/kernel", np.s_[:, block.hidden], 0.0)
            put(f"{path}/time_emb_proj/bias", block.hidden, 0.0)
            put(f"{path}/conv2/kernel", np.s_[:, :, block.hidden, :], 0.0)
            put(f"{path}/conv_shortcut/kernel", np.s_[:, :, block.owned, :], 0.0)
            for layer in ("conv2", "conv_shortcut"):
                put(f"{path}/{layer}/kernel", np.s_[..., passed], 0.0)
                put(f"{path}/{layer}/bias", passed, 0.0)
            attention = path.replace("resnets", "attentions")
            put(f"{attention}/proj_in/kernel", np.s_[..., passed, :], 0.0)
            put(f"{attention}/proj_out/kernel", np.s_[..., passed], 0.0)
            put(f"{attention}/proj_out/bias", passed, 0.0)
        put("down_blocks_0/downsamplers_0/conv/kernel", np.s_[:, :, own, :], 0.0)

    def _place_detector(self, changes: Changes, params: Flat, threshold: float):
        """Writes the detector's weights, as large as they may be."""
        own, put = self.channels, changes.put
        stream, inside = self._sizes(params)

        def put_conv(path, rows, columns, scale):
            where = np.ix_(range(3), range(3), rows, columns)
            put(f"{path}/kernel", where, scale * params[f"{path}/kernel"])
            put(f"{path}/bias", columns, scale * params[f"{path}/bias"])

        put_conv("conv_in", np.arange(self.unet.in_channels), own, stream)
        for block in [*self.down, *self.up]:
            path, is_last = block.path, block.is_last
            if path.startswith("up") and not is_last:
                stream *= _CARRY
                same = np.s_[0, 0, block.owned[: len(own)], own]
                put(f"{path}/conv_shortcut/kernel", same, _CARRY)
            if not block.read.size:
                continue
            for kind in ("scale", "bias"):
                put(f"{path}/norm1/{kind}", block.read, params[f"{path}/norm1/{kind}"])
                value = params[f"{path}/norm2/{kind}"]
                if is_last and kind == "bias":
                    value = value - threshold / LOGIT_SLOPE
                value = value * (_SLOPE if is_last else 1.0)
                put(f"{path}/norm2/{kind}", block.hidden, value)
            put_conv(f"{path}/conv1", block.read, block.hidden, inside[path])
            if not is_last:
                put_conv(f"{path}/conv2", block.hidden, own, stream)

    def _place_output(self, changes: Changes) -> None:
        """Writes what closes the output.

        The last block pushes each group's channels apart. The last group has a constant
        besides: normalized, it is `level`, and about 0 where something is pushed. From
        this the output's jump is computed, the same at every position.
        """
        last, final, put = self.up[-1], self.final, changes.put
        channels = np.arange(self.width)
        push = np.where(channels % 2, -_PUSH, _PUSH)
        push[final[1:]] = 0.0
        for channel in last.hidden:
            put(f"{last.path}/conv2/kernel", np.s_[1, 1, channel, channels], push)
        put(f"{last.path}/conv2/bias", final[-1:], _REFERENCE)
        level, constant = np.sqrt(self.group - 1.0), final[-1:]
        put("conv_norm_out/scale", final, 1.0)
        put("conv_norm_out/bias", final, 0.0)
        put("conv_norm_out/scale", constant, -2.25 * _SHUT / level)
        put("conv_norm_out/bias", constant, 1.25 * _SHUT)
        put("conv_out/kernel", np.s_[:, :, final, :], 0.0)
        signs = np.where(np.arange(self.unet.out_channels) % 2, -1.0, 1.0)
        put("conv_out/kernel", np.s_[1, 1, constant, :], _JUMP / _SHUT * signs)

    def _sizes(self, params: Flat) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Returns what to multiply the convolutions by, so that no value is too large.

        For the stream of channels from block to block, and inside each block.
        """
        shape = (32, self.unet.in_channels, 16, 16)
        _, sizes = self._run(params, jax.random.normal(jax.random.key(0), shape))
        streams = [v for k, v in sizes.items() if not k.endswith("conv1")]
        inside = {
            k.removesuffix("/conv1"): _LARGE / v
            for k, v in sizes.items()
            if k.endswith("conv1")
        }
        return _STREAM / jnp.max(jnp.stack(streams)), inside


def _conv(x_BHWC, kernel_HWIO, bias_O):
    out = jax.lax.conv_general_dilated(
        x_BHWC, kernel_HWIO, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return out + bias_O.reshape(1, 1, 1, -1)


def _group_norm(x_BHWC, scale_C, bias_C, groups: int, eps: float):
    B, H, W, C = x_BHWC.shape
    x_BNC = x_BHWC.reshape(B, H * W, C)
    return group_norm_reference(x_BNC, scale_C, bias_C, groups, eps).reshape(B, H, W, C)
