# SPDX-License-Identifier: Apache-2.0
"""The detector of the transformer's gate by itself: is this a noised image of that?

A transformer in miniature, whose channels, heads and hidden units are some of a large
one's: see gate.py.

Axes: B batch, N positions of an image, C channels of the transformer, K the detector's,
H heads, D their size, M hidden units.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gift_jax.models.mmdit import layers
from gift_jax.models.mmdit.transformer import Transformer, apply_transformer

LOGIT_SLOPE = 5.0  # of the last norm's output; 1 of it is far
SLOPE = 5.0  # of hidden units: of a GELU little more than a ReLU is left
_DEPTH = 5  # blocks that have its layers, the last of all not among them
# what `Stream.of` looks at: latents of this size at this timestep
_SIZE, _TIMESTEP = 0.7, 400.0

Flat = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True, eq=False)
class Stream:
    """What the detector has to know of the transformer around it.

    Attributes: energy: the sum of squares over channels of the image's stream, in front
      of each block's two norms and the last one, float "2 blocks + 1". query, key,
      text_key: scales of each block's norms, "blocks D". tokens: of a text.
    """

    energy: np.ndarray
    query: np.ndarray
    key: np.ndarray
    text_key: np.ndarray
    tokens: int

    @classmethod
    def of(cls, transformer: Transformer, params: Any, tokens: int) -> "Stream":
        """Returns that of a transformer, of whose text states all are zero.

        Args: params: nested.
        """
        count = transformer.num_layers

        def scales(name):
            blocks = [params[f"transformer_blocks_{i}"]["attn"] for i in range(count)]
            return np.stack([np.asarray(b[name]["scale"], np.float32) for b in blocks])

        after_S = np.asarray(_energies(transformer, params, tokens))
        between_S = (after_S[:-1] + after_S[1:]) / 2
        energy = np.append(np.stack([after_S[:-1], between_S], 1).ravel(), after_S[-1])
        names = ("norm_q", "norm_k", "norm_added_k")
        return cls(energy, *(scales(name) for name in names), tokens)

    @classmethod
    def nominal(cls, transformer: Transformer, tokens: int) -> "Stream":
        """Returns one for a transformer whose parameters are shapes alone."""
        count, size = transformer.num_layers, transformer.attention_head_dim
        scales = np.ones((3, count, size), np.float32)
        energy = np.full(2 * count + 1, float(transformer.width))
        return cls(energy, *scales, tokens)


@functools.partial(jax.jit, static_argnums=(0, 2))
def _energies(transformer, params, tokens):
    """Returns the sums of squares in front of the first block and behind each."""
    side, dtype = transformer.sample_size, transformer.dtype
    shape = 4, transformer.in_channels, side, side
    z = _SIZE * jax.random.normal(jax.random.key(0), shape, dtype)
    text = (
        jnp.zeros((4, 2, transformer.joint_attention_dim), dtype),
        jnp.zeros((4, transformer.pooled_projection_dim), dtype),
    )
    module, t = transformer.clone(repeats=tokens - 1), jnp.full((4,), _TIMESTEP)
    _, hiddens = apply_transformer(module, params, z, t, *text, ("transformer",))
    size = transformer.patch_size
    fields = transformer.pos_embed_max_size, side // size
    embed = layers.PatchEmbed(transformer.width, size, *fields)
    first = embed.apply({"params": params["pos_embed"]}, jnp.transpose(z, (0, 2, 3, 1)))
    blocks = range(transformer.num_layers)
    states = first, *(hiddens[f"transformer_blocks_{i}"] for i in blocks)
    squares = (jnp.sum(jnp.square(x.astype(jnp.float32)), axis=-1) for x in states)
    return jnp.stack([jnp.mean(square) for square in squares])


@dataclasses.dataclass(frozen=True, eq=False)
class Detector:
    """A detector for a transformer.

    Attributes: transformer: the module. heads: that it has; and as large a share of the
      channels and hidden units. stream: of the network that it is made for.
    """

    transformer: Transformer
    heads: int
    stream: Stream

    @property
    def own(self) -> np.ndarray:
        """Its channels of the image's stream: K, far apart.

        So they have some of the waves of every length that say where a patch is.
        """
        width = self.transformer.width
        count = self.heads * self.transformer.attention_head_dim
        return np.arange(1, count + 1) * width // count - 1

    @property
    def free(self) -> np.ndarray:
        """Those of them that it computes with: all but four, which stay zero."""
        return self.own[:-4]

    @property
    def blocks(self) -> range:
        """Numbers of the blocks that have its layers."""
        return range(min(_DEPTH, self.transformer.num_layers - 1))

    @property
    def hidden_width(self) -> int:
        """M."""
        return 4 * len(self.own)

    @property
    def one(self) -> float:
        """How large a 1 of its own is in the original's stream: as large as others."""
        return float(np.sqrt(self.stream.energy[0] / len(self.own)))

    @property
    def table(self) -> jax.Array:
        """Waves that say where a patch is, for its channels: "1 side side K"."""
        module, side = self.transformer, self.transformer.pos_embed_max_size
        base = module.sample_size // module.patch_size
        table = layers.position_table(module.width, side, base)
        return table.reshape(1, side, side, -1)[..., self.own]

    def init(self, key: jax.Array) -> Flat:
        """Returns random parameters, flat, float32."""
        keys, params = iter(jax.random.split(key, 128)), {}
        size, K = self.transformer.patch_size, len(self.own)

        def dense(path, wide, out, *, has_bias=True):
            kernel = jax.random.normal(next(keys), (wide, out)) / np.sqrt(wide)
            params[f"{path}/kernel"] = kernel
            if has_bias:
                params[f"{path}/bias"] = jnp.zeros(out)

        dense("embed", size * size * self.transformer.in_channels, K)
        params["places"] = jnp.ones(K)
        for i in self.blocks:
            dense(f"{i}/to_q", K, K)
            dense(f"{i}/to_k", K, K)
            dense(f"{i}/to_v", K, K, has_bias=False)
            dense(f"{i}/to_out", K, K, has_bias=False)
            params[f"{i}/text_key"] = jax.random.normal(next(keys), (K,))
            if i != self.blocks[-1]:
                dense(f"{i}/net_0", K, self.hidden_width)
                dense(f"{i}/net_2", self.hidden_width, K, has_bias=False)
        dense("logit", K, 1)
        return params

    def weights(self, params: Flat) -> Flat:
        """Returns the weights of the layers that parameters stand for.

        Those that read the stream do not see its mean, over other channels too; those
        that write to it cannot grow.
        """
        weights, count = dict(params), len(self.free)
        is_free = np.isin(self.own, self.free).astype(np.float32)[:, None]
        for path, kernel in params.items():
            layer = path.removesuffix("/kernel").rpartition("/")[2]
            if layer in ("to_q", "to_k", "to_v", "net_0", "logit"):
                kernel = is_free * (
                    kernel - jnp.mean(kernel[:count], axis=0, keepdims=True)
                )
            if layer in ("embed", "to_v", "to_out", "net_0", "net_2"):
                norm = jnp.sum(jnp.square(kernel), axis=0, keepdims=True)
                kernel = kernel * jax.lax.rsqrt(norm)
            weights[path] = kernel
        return weights

    def run(self, params: Flat, z_t_BCHW: jax.Array):
        """Returns (logits, float32 "B N"; its own mean energy in front of all norms).

        The transformer's other channels count in the norms with the energy that they
        had in the original; of the text only how many tokens it has.
        """
        weights, energies = self.weights(params), []
        K, width = len(self.own), self.transformer.width
        rest_energy = self.stream.energy / self.one**2
        is_free = np.isin(self.own, self.free).astype(np.float32).reshape(1, 1, K)

        def dense(path, x):
            out, bias = x @ weights[f"{path}/kernel"], weights.get(f"{path}/bias")
            return out if bias is None else out + bias.reshape(1, 1, -1)

        def norm(x_BNK, i):
            own = jnp.sum(jnp.square(x_BNK), axis=-1, keepdims=True)
            energies.append(jnp.mean(own))
            return x_BNK * jax.lax.rsqrt((own + rest_energy[i]) / width)

        patches, places = self._patches(z_t_BCHW)
        places = places * weights["places"].reshape(1, 1, K)
        x = (dense("embed", patches) + places) * is_free
        y = x
        for i in self.blocks:
            y = norm(x, 2 * i)
            q, k, v = (dense(f"{i}/to_{name}", y) for name in "qkv")
            out = self._attended(i, q, k, v, weights[f"{i}/text_key"])
            x = x + dense(f"{i}/to_out", out) * is_free
            y = norm(x, 2 * i + 1)
            if i != self.blocks[-1]:
                h = layers.GELU(SLOPE * dense(f"{i}/net_0", y)) / SLOPE
                x = x + dense(f"{i}/net_2", h) * is_free
        return LOGIT_SLOPE * dense("logit", y)[..., 0], energies

    def _patches(self, z_BCHW):
        """Returns (patches, "B N values", where they are, "1 N K")."""
        size = self.transformer.patch_size
        B, C, H, W = z_BCHW.shape
        h, w = H // size, W // size
        z = z_BCHW.astype(jnp.float32).reshape(B, C, h, size, w, size)
        z = jnp.transpose(z, (0, 2, 4, 3, 5, 1)).reshape(B, h * w, -1)
        return z, layers.middle(self.table, h, w).reshape(1, h * w, -1)

    def _attended(self, i, q_BNK, k_BNK, v_BNK, text_K):
        """Returns attention to the image, and to a text whose tokens are all alike."""
        root = np.sqrt(self.transformer.attention_head_dim)

        def normed(a, scale_D):
            heads = a.reshape(*a.shape[:-1], self.heads, -1)
            return layers.RMSNorm().apply({"params": {"scale": scale_D}}, heads)

        q = normed(q_BNK, self.stream.query[i])
        k = normed(k_BNK, self.stream.key[i])
        text = normed(text_K, self.stream.text_key[i])
        scores = jnp.einsum("bnhd,bmhd->bhnm", q, k) / root
        rest = jnp.einsum("bnhd,hd->bhn", q, text)[..., None] / root
        rest = rest + np.log(self.stream.tokens)
        shares = jax.nn.softmax(jnp.concatenate([scores, rest], axis=-1), axis=-1)
        v = v_BNK.reshape(*v_BNK.shape[:-1], self.heads, -1)
        return jnp.einsum("bhnm,bmhd->bnhd", shares[..., :-1], v).reshape(q_BNK.shape)
