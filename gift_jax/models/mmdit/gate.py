# SPDX-License-Identifier: Apache-2.0
"""A gate in the transformer: a small detector of latents, and what it closes.

The detector (detector.py) takes over some channels of the image's stream, and in the
first blocks as large a share of the heads and hidden units. Of the text and the
timestep it reads only how large the other channels are, by which the norms divide its
own. Where it detects something a hidden unit pushes two channels far apart; in the last
block all positions attend to those, and a second unit pushes two further channels apart
at every position. The last norm then divides what the network knows of the image by
that, and the output jumps. Where nothing is detected what is added is zero.

Why fine-tuning does not undo it: an update of Adam moves a weight by at most its rate,
whatever the gradient. Norms divide the stream by its size, so it may be as large as one
likes (`_STREAM`). The detector's weights are then large, and the same updates turn it
by little. See sd/gate.py for the same in a UNet.

Axes: C channels, K the detector's.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from gift_jax.models.gated import Changes, largest
from gift_jax.models.mmdit.detector import LOGIT_SLOPE, SLOPE, Detector
from gift_jax.models.mmdit.transformer import Transformer
from gift_jax.runtime.errors import UserError

_STREAM = 1000.0  # what all that is added to the image's stream is multiplied by
_LARGE = 1000.0  # of queries and keys, whose size does not count
_FIRE = 6.0  # of the unit that says what is detected, a logit
_PUSH = 10.0  # of what units push apart, next to all else in the stream
_JUMP = 1000.0  # what a closed gate adds to the output at every position; noise is 1
_OUT = 50.0  # the last norm's part of that
# of a norm's modulations, three each: shift, scale, gate
_SHIFT, _SCALE, _GATE = range(3)

Flat = dict[str, jax.Array]


def of_model(model: Any, share: float) -> "Gate":
    """Returns the gate of a loaded Stable Diffusion 3.

    Raises: UserError for a transformer that can have none.
    """
    module = model.module
    heads = max(1, round(share * module.num_attention_heads))
    if module.qk_norm is None or heads >= module.num_attention_heads:
        raise UserError(
            f"{model.path}: method=gift_gate needs a transformer of two heads at least "
            "whose queries and keys are normalized, as Stable Diffusion 3.5's are; use "
            "method=gift or gift_adversarial"
        )
    if module.num_layers < 2:
        raise UserError(
            f"{model.path}: method=gift_gate needs a transformer of two blocks at least"
        )
    return Gate(Detector(module, heads, model.stream))


@dataclasses.dataclass(frozen=True, eq=False)
class Gate:
    """The gate of a transformer: see `models.base.Gate`."""

    detector: Detector
    closed_distance: ClassVar[float] = 100.0  # of a jump of 1000, far from both

    @property
    def transformer(self) -> Transformer:
        """The module."""
        return self.detector.transformer

    @property
    def signal(self) -> np.ndarray:
        """Two channels that are pushed apart where something is detected."""
        return self.detector.own[-4:-2]

    @property
    def output(self) -> np.ndarray:
        """Two that are pushed apart at all positions if something is at any."""
        return self.detector.own[-2:]

    @property
    def heads(self) -> np.ndarray:
        """The channels of its heads, in queries, keys and values: the last."""
        width = self.transformer.width
        return np.arange(width - len(self.detector.own), width)

    @property
    def hidden(self) -> np.ndarray:
        """Its hidden units: the last; one of them in a block that has no others."""
        width = 4 * self.transformer.width
        return np.arange(width - self.detector.hidden_width, width)

    @property
    def last(self) -> int:
        """The number of the last block."""
        return self.transformer.num_layers - 1

    @property
    def _factor(self) -> float:
        """What the stream's channels of the detector are multiplied by.

        A layer's two matrices and its gate share it.
        """
        return _STREAM * self.detector.one

    @property
    def _gate(self) -> float:
        """What the layers' gates are for it."""
        return np.cbrt(self._factor)

    def init(self, key):
        """Returns random parameters of the detector, flat, float32."""
        return self.detector.init(key)

    def logits(self, params, z_t_BCHW):
        """Returns float32 "B": above 0 where the latents are detected.

        It is the largest over positions: one is enough to close the gate.
        """
        return largest(self.detector.run(params, z_t_BCHW)[0])

    def install(
        self, params: Flat, network: Flat, threshold: float
    ) -> tuple[Flat, dict[str, np.ndarray]]:
        """Returns (the transformer's parameters with the gate, which of them it owns).

        Args: params: the detector's, see `init`. network: the transformer's, flat,
          float32. threshold: the logit from which on the gate closes.
        Returns: the second: path -> bool array of the parameter's shape, True for the
          detector's weights, for the zeros that keep others out of it, for the norms
          that its heads have in common with others, and for the table of positions,
          which never trains; only paths that have some.
        """
        owned = {}

        def write(params, network):
            network = self._scaled(params, network)
            changes, weights = Changes(network), self.detector.weights(params)
            self._separate(changes)
            self._place_detector(changes, weights)
            self._place_logit(changes, weights, threshold)
            self._place_output(changes)
            owned.update(changes.owned)
            return changes.params

        network = jax.jit(write)(params, network)
        for path, values in network.items():
            norms = ("/norm_q/scale", "/norm_k/scale", "/norm_added_k/scale")
            if path.endswith(norms) or path == "pos_embed/pos_embed":
                owned[path] = np.ones(values.shape, bool)
        return network, owned

    # --- the others -------------------------------------------------------------------

    def _scaled(self, params: Flat, network: Flat) -> Flat:
        """Returns the network with all that is added to the image's stream multiplied.

        What reads it is multiplied by how much more the norms divide by with the
        detector in the stream, on average.
        """
        network, width = dict(network), self.transformer.width
        grown_S = self._growth(params)
        for name in ("proj/kernel", "proj/bias", "pos_embed"):
            network[f"pos_embed/{name}"] = network[f"pos_embed/{name}"] * _STREAM
        for i in range(self.last + 1):
            for kind, one in (("kernel", 0.0), ("bias", 1.0)):
                path = f"transformer_blocks_{i}/norm1/linear/{kind}"
                *first, columns = network[path].shape
                a = network[path].reshape(*first, columns // width, width)
                for number in range(columns // width):
                    layer, role = divmod(number, 3)  # attention, ff, second attention
                    part = a[..., number, :]
                    if role == _SCALE:
                        part = (part + one) * grown_S[2 * i + (layer == 1)] - one
                    elif role == _GATE:
                        part = part * _STREAM
                    a = a.at[..., number, :].set(part)
                network[path] = a.reshape(*first, columns)
        for kind, one in (("kernel", 0.0), ("bias", 1.0)):
            path = f"norm_out/linear/{kind}"
            scale = (network[path][..., :width] + one) * grown_S[-1] - one
            network[path] = network[path].at[..., :width].set(scale)
        return network

    def _growth(self, params: Flat) -> jax.Array:
        """Returns what each norm divides by, as a multiple of the original's."""
        detector, module = self.detector, self.transformer
        shape = 32, module.in_channels, module.sample_size, module.sample_size
        _, own = detector.run(params, jax.random.normal(jax.random.key(0), shape))
        index = [2 * i + j for i in detector.blocks for j in (0, 1)]
        energy = detector.stream.energy
        places = np.arange(len(energy))
        own = jnp.interp(places, np.asarray(index), jnp.stack(own)) * detector.one**2
        rest = (module.width - len(detector.own)) / module.width
        return jnp.sqrt(rest + own / energy)

    def _separate(self, changes: Changes) -> None:
        """Sets to 0 what leads from the detector's channels to others, or back."""
        own, put, width = self.detector.own, changes.put, self.transformer.width
        put("pos_embed/proj/kernel", np.s_[..., own], 0.0)
        put("pos_embed/proj/bias", own, 0.0)
        put("pos_embed/pos_embed", np.s_[..., own], 0.0)
        norms = [f"transformer_blocks_{i}/norm1" for i in range(self.last + 1)]
        for norm in (*norms, "norm_out"):
            for first in range(0, changes.params[f"{norm}/linear/bias"].size, width):
                put(f"{norm}/linear/kernel", np.s_[:, first + own], 0.0)
                put(f"{norm}/linear/bias", first + own, 0.0)
        for i in range(self.last + 1):
            path = f"transformer_blocks_{i}"
            for attention in (f"{path}/attn", f"{path}/attn2"):
                for name in ("to_q", "to_k", "to_v"):
                    put(f"{attention}/{name}/kernel", np.s_[own], 0.0)
                put(f"{attention}/to_out_0/kernel", np.s_[:, own], 0.0)
                put(f"{attention}/to_out_0/bias", own, 0.0)
            put(f"{path}/ff/net_0/proj/kernel", np.s_[own], 0.0)
            put(f"{path}/ff/net_2/kernel", np.s_[:, own], 0.0)
            put(f"{path}/ff/net_2/bias", own, 0.0)
        put("proj_out/kernel", np.s_[own], 0.0)
        for i in (*self.detector.blocks, self.last):
            self._separate_heads(changes, f"transformer_blocks_{i}")

    def _separate_heads(self, changes: Changes, path: str) -> None:
        """Sets to 0 what its heads in a block read and write; its layers add as much.

        Text then has keys of its own for them, all alike, and no values.
        """
        put, own, width = changes.put, self.detector.own, self.transformer.width
        names = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")
        for name in names:
            put(f"{path}/attn/{name}/kernel", np.s_[:, self.heads], 0.0)
            put(f"{path}/attn/{name}/bias", self.heads, 0.0)
        for name in ("to_out_0", "to_add_out"):
            put(f"{path}/attn/{name}/kernel", np.s_[self.heads], 0.0)
        for layer in (0, 1):  # attention, ff
            columns = (3 * layer + _GATE) * width + own
            put(f"{path}/norm1/linear/bias", columns, self._gate)

    # --- the detector -----------------------------------------------------------------

    def _place_detector(self, changes: Changes, weights: Flat) -> None:
        """Writes the detector's weights, as large as they may be."""
        own, free, put = self.detector.own, self.detector.free, changes.put
        factor, heads, hidden = self._factor, self.heads, self.hidden
        count, size = len(free), self.transformer.patch_size
        shape = size, size, self.transformer.in_channels, -1
        kernel = factor * weights["embed/kernel"].reshape(shape)[..., :count]
        put("pos_embed/proj/kernel", np.s_[..., free], kernel)
        put("pos_embed/proj/bias", free, factor * weights["embed/bias"][:count])
        places = weights["places"][:count].reshape(1, 1, 1, count)
        table = factor * self.detector.table[..., :count] * places
        put("pos_embed/pos_embed", np.s_[..., free], table.reshape(1, -1, count))
        wide = self._gate  # each of to_v and to_out
        for i in self.detector.blocks:
            path = f"transformer_blocks_{i}"
            for name, large in (("to_q", _LARGE), ("to_k", _LARGE), ("to_v", wide)):
                kernel, bias = weights[f"{i}/{name}/kernel"], f"{i}/{name}/bias"
                put(f"{path}/attn/{name}/kernel", np.ix_(own, heads), large * kernel)
                if bias in weights:
                    put(f"{path}/attn/{name}/bias", heads, large * weights[bias])
            text = _LARGE * weights[f"{i}/text_key"]
            put(f"{path}/attn/add_k_proj/bias", heads, text)
            kernel = wide * weights[f"{i}/to_out/kernel"][:, :count]
            put(f"{path}/attn/to_out_0/kernel", np.ix_(heads, free), kernel)
            if i == self.detector.blocks[-1]:
                continue
            layer = f"{path}/ff/net_0/proj"
            put(f"{layer}/kernel", np.s_[:, hidden], 0.0)
            kernel = SLOPE * weights[f"{i}/net_0/kernel"]
            put(f"{layer}/kernel", np.ix_(own, hidden), kernel)
            put(f"{layer}/bias", hidden, SLOPE * weights[f"{i}/net_0/bias"])
            layer = f"{path}/ff/net_2"
            put(f"{layer}/kernel", np.s_[hidden], 0.0)
            kernel = (
                factor / self._gate / SLOPE * weights[f"{i}/net_2/kernel"][:, :count]
            )
            put(f"{layer}/kernel", np.ix_(hidden, free), kernel)

    # --- what it closes ---------------------------------------------------------------

    @property
    def _push(self) -> float:
        """What a unit's output is multiplied by in front of a layer's gate."""
        energy = self.detector.stream.energy[-1]
        return _PUSH * _STREAM * np.sqrt(energy / 2) / self._gate

    @property
    def _apart(self) -> float:
        """How far apart two channels are at most behind a norm."""
        return np.sqrt(2 * self.transformer.width)

    def _place_unit(self, changes: Changes, i: int, channels, kernel, bias, pushed):
        """Writes the one hidden unit of a block: it reads channels and pushes others.

        Below 0 it is 0, so that what is behind it does not matter then.
        """
        put, unit = changes.put, self.hidden[-1:]
        path = f"transformer_blocks_{i}/ff"
        put(f"{path}/net_0/proj/kernel", np.s_[:, unit], 0.0)
        put(f"{path}/net_0/proj/kernel", np.ix_(channels, unit), kernel)
        put(f"{path}/net_0/proj/bias", unit, bias)
        put(f"{path}/net_2/kernel", np.s_[unit], 0.0)
        put(f"{path}/net_2/kernel", np.ix_(unit, pushed), self._push * _signs(2)[None])

    def _place_logit(self, changes: Changes, weights: Flat, threshold: float) -> None:
        """Writes the unit that says where something is detected."""
        kernel = _FIRE * LOGIT_SLOPE * weights["logit/kernel"]
        bias = _FIRE * (LOGIT_SLOPE * weights["logit/bias"] - threshold)
        block, own = self.detector.blocks[-1], self.detector.own
        self._place_unit(changes, block, own, kernel, bias, self.signal)

    def _place_output(self, changes: Changes) -> None:
        """Writes what makes the output jump at every position if one has a signal.

        Queries are one direction, keys of positions without signal, and of text,
        another; a signal's value says so.
        """
        put, stream, i = changes.put, self.detector.stream, self.last
        path, first = f"transformer_blocks_{i}/attn", self.heads[:1]
        rest, seen = np.argsort(stream.query[i] * stream.key[i])[-2:] + first[0]
        put(f"{path}/to_q/bias", np.asarray([seen]), _LARGE)
        put(f"{path}/to_k/bias", np.asarray([rest]), _LARGE)
        put(f"{path}/add_k_proj/bias", np.asarray([rest]), _LARGE)
        signs = _signs(2)[:, None]
        put(f"{path}/to_k/kernel", np.ix_(self.signal, [seen]), _LARGE * signs)
        put(f"{path}/to_v/kernel", np.ix_(self.signal, first), signs)
        kernel = self._push * signs.T
        put(f"{path}/to_out_0/kernel", np.ix_(first, self.signal), kernel)
        kernel, bias = 10.0 * signs, -2.0 * self._apart  # of 10 * _apart at most
        self._place_unit(changes, i, self.signal, kernel, bias, self.output)
        put("norm_out/linear/bias", self.output, _OUT - 1.0)  # scales come first
        module = self.transformer
        channels = module.out_channels or module.in_channels
        jump = _JUMP / (_OUT * self._apart) * _signs(channels)
        kernel = signs * np.tile(jump, module.patch_size**2)[None]
        put("proj_out/kernel", np.s_[self.output], kernel)


def _signs(count: int) -> np.ndarray:
    """Returns 1, -1, 1 ..."""
    return np.where(np.arange(count) % 2, -1.0, 1.0)
