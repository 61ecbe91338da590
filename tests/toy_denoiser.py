# SPDX-License-Identifier: Apache-2.0
"""A denoiser of one cross-attention block: compiles in a blink, exact in float64.

`Model` has it as a model family: what defenses and attacks read of one, in memory.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from gift_jax.diffusion import Ddpm, Denoiser, NoiseProcess
from gift_jax.models import flow_schedule
from gift_jax.models.base import Split
from gift_jax.models.ops.kernels import Kernels
from gift_jax.models.trainable import TRAINABLE_SETS, select_trainable
from gift_jax.models.weights import TOKEN_TABLE, by_component

T, C, SIDE, L, D, WIDTH = 10, 4, 2, 3, 5, 6
SHAPES = {
    "block/attn2/to_q/kernel": (C, WIDTH),
    "block/attn2/to_k/kernel": (D, WIDTH),
    "block/attn2/to_v/kernel": (D, WIDTH),
    "block/attn2/to_out_0/kernel": (WIDTH, C),
    "block/attn1/to_q/kernel": (C, C),
    "block/proj_in/kernel": (C, C),
}
PARTITION_RULES = ((r"kernel", ("fsdp",)),)
LORA_TARGETS = r"/attn[12]/(to_q|to_k|to_v|to_out_0)/kernel$"
SCHEDULER = {"num_train_timesteps": T, "clip_sample": False}
FLOW = {"_class_name": flow_schedule.CLASSES[0], "num_train_timesteps": T, "shift": 2.0}
WORDS = ("[", "]", "a", "thing", "bomb", "cat")  # start and end of a text, then words


def predict(params, z_BCHW, t_B, cond, capture=()):
    """One block: cross-attention beside a projection, then tanh."""
    block = params["block"]
    kernel = {name: p["kernel"] for name, p in block["attn2"].items()}
    x_BND = z_BCHW.reshape(z_BCHW.shape[0], C, -1).swapaxes(1, 2)
    q = x_BND @ kernel["to_q"] @ jnp.eye(WIDTH, dtype=x_BND.dtype)
    c_BLD = cond["states"]
    k, v = c_BLD @ kernel["to_k"], c_BLD @ kernel["to_v"]
    attention = jax.nn.softmax(jnp.einsum("bnd,bld->bnl", q, k), axis=-1)
    h = attention @ v @ kernel["to_out_0"] + x_BND @ block["proj_in"]["kernel"]
    h = h + jnp.sin(x_BND @ block["attn1"]["to_q"]["kernel"])
    h_BND = jnp.tanh(h + t_B.reshape(-1, 1, 1) / T)
    out = h_BND.swapaxes(1, 2).reshape(z_BCHW.shape)
    return out, ({"block": h_BND} if "transformer" in capture else {})


def noise(kind="epsilon"):
    """The noise process; float64, which JAX takes for its own default."""
    if kind == "flow":
        return flow_schedule.noise_process(FLOW)
    return Ddpm(np.linspace(0.95, 0.1, T), kind)


def denoiser(kind="epsilon"):
    return Denoiser(predict, noise(kind))


def params(dtype=np.float32, seed=0):
    """Flat parameters, path -> array."""
    rng = np.random.default_rng(seed)
    return {
        path: jnp.asarray(rng.normal(size=shape) * 0.5, dtype)
        for path, shape in SHAPES.items()
    }


def batch(count, dtype=np.float32, seed=0):
    """Cached pairs: mean, std, cond."""
    rng = np.random.default_rng(100 + seed)
    shape = (count, C, SIDE, SIDE)
    return {
        "mean": jnp.asarray(rng.normal(size=shape), dtype),
        "std": jnp.asarray(rng.uniform(0.01, 0.1, size=shape), dtype),
        "cond": {"states": jnp.asarray(rng.normal(size=(count, L, D)), dtype)},
    }


# --- as a model -----------------------------------------------------------------------


class Tokenizer:
    """Every word of its vocabulary is one token, as are words that are added."""

    eos_token_id = WORDS.index("]")
    added_tokens_encoder: dict = {}  # no word of several vectors

    def __init__(self):
        self.vocabulary = {word: i for i, word in enumerate(WORDS)}

    def __len__(self):
        return len(self.vocabulary)

    def get_vocab(self):
        return dict(self.vocabulary)

    def add_tokens(self, words):
        for word in words:
            self.vocabulary[word] = len(self)

    def tokenize(self, text):
        return [word if word in self.vocabulary else "thing" for word in text.split()]

    def convert_tokens_to_ids(self, tokens):
        return [self.vocabulary[token] for token in tokens]

    def __call__(self, prompts, add_special_tokens=True):
        """int32 "B L": the start, the first word, and the end; or a prompt's words."""
        if not add_special_tokens:
            ids = self.convert_tokens_to_ids(self.tokenize(prompts))
            return {"input_ids": ids}
        rows = []
        for prompt in prompts:
            ids = [self.vocabulary[word] for word in self.tokenize(prompt)[-1:]]
            ids = [0, *ids] + [self.eos_token_id] * L
            rows.append(ids[:L])
        return np.asarray(rows, np.int32)


@dataclasses.dataclass(frozen=True)
class Model:
    """The toy with a text encoder that is a table; see models/base.py."""

    params: dict
    tokenizer: Tokenizer
    noise: NoiseProcess
    scheduler_config: dict
    denoiser_component: str

    kernels = Kernels()
    path = None
    image_size = SIDE
    latent_shape = (C, SIDE, SIDE)
    trainable_sets = TRAINABLE_SETS
    layer_kinds = ("transformer",)
    lora_targets = LORA_TARGETS
    partition_rules = PARTITION_RULES
    text_components = ("text_encoder",)
    ids_shape = (L,)

    @property
    def denoiser(self):
        return Denoiser(predict, self.noise)

    @property
    def denoiser_params(self):
        return self.params[self.denoiser_component]

    @property
    def folder(self):
        return Folder(self)

    def replace(self, **changes):
        return dataclasses.replace(self, **changes)

    def with_kernels(self, kernels):
        return self  # it has no layers of a kind

    def with_tokenizer(self, tokenizer):
        return self.replace(tokenizer=tokenizer)

    def updated(self, changed):
        new = dict(self.params)
        for component, arrays in by_component(changed, self.denoiser_component).items():
            flat = flatten_dict(new[component], sep="/") | arrays
            new[component] = unflatten_dict(flat, sep="/")
        return self.replace(params=new)

    def tokenize(self, prompts):
        return self.tokenizer(prompts)

    def encode_ids(self, params, ids_BL):
        flat = flatten_dict(params["text_encoder"], sep="/")
        return {"states": flat[TOKEN_TABLE][ids_BL]}

    def encode_text(self, prompts):
        return self.encode_ids(self.params, self.tokenize(prompts))

    def image_cond(self, frames_N4):
        return {}

    def encode_images(self, images_BHWC):
        """Three channels and their mean, and a small deviation."""
        mean_BHW1 = jnp.mean(images_BHWC, axis=-1, keepdims=True)
        mean = jnp.concatenate([images_BHWC, mean_BHW1], axis=-1)
        mean_BCHW = jnp.transpose(mean, (0, 3, 1, 2))
        return mean_BCHW, jnp.full(mean_BCHW.shape, 0.05)

    def trainable_paths(self, trainable_set):
        return tuple(select_trainable(self.denoiser_params, trainable_set)[0])

    def split(self, trainable_set):
        return Split(*select_trainable(self.denoiser_params, trainable_set))

    def gate(self, share):
        return Gate()

    def float32_params(self, component, paths):
        flat, paths = flatten_dict(self.params[component], sep="/"), set(paths)
        return {path: flat[path] for path in flat if path in paths}


class Gate:
    """Weighs the latents' channels, and lies in a row of one kernel."""

    PATH = "block/attn1/to_q/kernel"
    closed_distance = 1.0

    def init(self, key):
        return {"detector": jax.random.normal(key, (C,))}

    def logits(self, params, z_t_BCHW):
        return 30.0 * jnp.mean(z_t_BCHW, (2, 3)) @ params["detector"]

    def install(self, params, network, threshold):
        owned = np.zeros((C, C), bool)
        owned[0] = True
        kernel = network[self.PATH].at[0].set(params["detector"])
        return {**network, self.PATH: kernel}, {self.PATH: owned}


@dataclasses.dataclass(frozen=True)
class Folder:
    """What a model's folder would have."""

    model: Model
    path = None

    @property
    def denoiser_component(self):
        return self.model.denoiser_component

    def float32_params(self, component, paths):
        return jax.device_get(self.model.float32_params(component, paths))

    def load_tokenizer(self):
        return Tokenizer()


def model(kind="epsilon"):
    """The toy as a model, its arrays its own; "flow": as a family of transformers."""
    table = np.random.default_rng(7).normal(size=(len(WORDS), D))
    text = {TOKEN_TABLE: jnp.asarray(table, jnp.float32)}
    is_flow = kind == "flow"
    component, config = ("transformer", FLOW) if is_flow else ("unet", SCHEDULER)
    nested = {component: params(), "text_encoder": text}
    nested = {name: unflatten_dict(flat, sep="/") for name, flat in nested.items()}
    return Model(nested, Tokenizer(), noise(kind), config, component)
