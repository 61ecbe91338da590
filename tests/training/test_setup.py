# SPDX-License-Identifier: Apache-2.0
"""What training and attacking share: optimizers, splits, batches, data groups."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict
from PIL import Image
from tiny_model import write_pictures

from gift_jax.data import cache, pipeline
from gift_jax.data.cache import DataGroup, Generation
from gift_jax.models.load import EMBEDDED, kernels_of, load_model, model_folder
from gift_jax.runtime import config
from gift_jax.runtime.errors import UserError
from gift_jax.sampling.generated import load_group
from gift_jax.state import run_key
from gift_jax.training import setup
from gift_jax.training.optimizer import Optimizer, make_optimizer

# --- the optimizer --------------------------------------------------------------------


def adamw(**fields):
    return Optimizer(**{"lr": 0.1, "weight_decay": 0.0, "clip_norm": 0.0} | fields)


def rates(settings, steps):
    """The sizes of the updates under a gradient that never changes."""
    tx = make_optimizer(settings, steps)
    params, grads = {"w": jnp.ones(())}, {"w": jnp.float32(2.0)}
    state, sizes = tx.init(params), []
    update = jax.jit(tx.update)
    for _ in range(steps):
        updates, state = update(grads, state, params)
        sizes.append(-float(updates["w"]))
    return sizes


def test_optimizer_is_adamw():
    ours = make_optimizer(adamw(weight_decay=0.3), 10)
    theirs = optax.adamw(0.1, 0.9, 0.999, weight_decay=0.3)
    params = {"w": jnp.asarray([1.0, -2.0, 3.0])}
    states = ours.init(params), theirs.init(params)
    for i in range(3):
        grads = {"w": jnp.asarray([0.5, 1e-6, -3.0]) * (i + 1)}
        (a, s_a), (b, s_b) = (
            tx.update(grads, s, params)
            for tx, s in zip((ours, theirs), states, strict=True)
        )
        states = s_a, s_b
        assert np.abs(a["w"]).min() > 1e-3
        np.testing.assert_allclose(a["w"], b["w"], rtol=1e-5)


def test_schedules():
    np.testing.assert_allclose(rates(adamw(), 4), 0.1, rtol=1e-4)
    cosine = rates(adamw(schedule="cosine"), 4)
    expected = 0.05 * (1 + np.cos(np.pi * np.arange(4) / 4))
    np.testing.assert_allclose(cosine, expected, rtol=1e-3)
    warm = rates(adamw(warmup_frac=0.5), 8)
    expected = [0, 0.025, 0.05, 0.075, 0.1, 0.1, 0.1, 0.1]
    np.testing.assert_allclose(warm, expected, rtol=1e-3, atol=1e-7)


def test_gradients_are_clipped_by_their_global_norm():
    params = {"a": jnp.zeros(2), "b": jnp.zeros(2)}
    grads = {"a": jnp.full(2, 300.0), "b": jnp.full(2, 400.0)}

    def first_moment(clip_norm):
        tx = make_optimizer(adamw(clip_norm=clip_norm), 1)
        _, state = tx.update(grads, tx.init(params), params)
        mean = optax.tree_utils.tree_get(state, "mu")
        return np.concatenate([mean["a"], mean["b"]])

    free, clipped = first_moment(0.0), first_moment(1.0)
    np.testing.assert_allclose(np.linalg.norm(clipped), 0.1, rtol=1e-5)
    np.testing.assert_allclose(clipped / 0.1, free / np.linalg.norm(free), rtol=1e-5)


# --- the model ------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_split_keeps_what_trains_in_float32_as_it_is_on_disk(tiny, tiny_folder, dtype):
    parts = load_model(str(tiny_folder), dtype).split("cross_attention")
    assert {a.dtype for a in parts.trainable.values()} == {jnp.dtype(jnp.float32)}
    assert {a.dtype for a in parts.frozen.values()} == {jnp.dtype(dtype)}
    exact = flatten_dict(tiny.params["unet"], sep="/")
    assert set(exact) == set(parts.trainable) | set(parts.frozen)
    for path, array in parts.trainable.items():
        np.testing.assert_array_equal(array, exact[path])


def test_noise_process_is_the_models_schedule(tiny):
    noise = tiny.denoiser.noise
    assert (noise.prediction_type, noise.num_timesteps) == ("epsilon", 1000)
    fields = {"prediction_type": "v_prediction", "num_train_timesteps": 50}
    other = tiny.replace(scheduler_config=tiny.scheduler_config | fields).noise
    assert (other.prediction_type, other.num_timesteps) == ("v_prediction", 50)


def test_unknown_model_and_dtype_are_named(tiny_folder):
    assert model_folder("emoji-sd") == EMBEDDED
    with pytest.raises(UserError, match="nowhere"):
        load_model("nowhere")
    with pytest.raises(UserError, match="config.compute_dtype='half' is not one of"):
        load_model(str(tiny_folder), "half")


@pytest.mark.parametrize(
    "attention, platform, dtype, message",
    [
        ("flash", "cpu", "bfloat16", "flash needs a TPU, and this is a CPU; try auto"),
        ("cudnn", "tpu", "bfloat16", "cudnn needs a GPU, and this is a TPU; try auto"),
        ("cudnn", "gpu", "float32", "cudnn needs config.compute_dtype=bfloat16"),
        ("cudnn", "gpu", "bfloat16", ""),
        ("chunked", "tpu", "float32", ""),
    ],
)
def test_attention_fits_the_devices(monkeypatch, attention, platform, dtype, message):
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    hardware = setup.Hardware(attention=attention)
    run = setup.Run(compute_dtype=dtype, hardware=hardware)
    if message:
        with pytest.raises(UserError, match="^config.hardware.attention=" + message):
            kernels_of(run, None)
    else:
        assert kernels_of(run, None).attention == attention


# --- devices and batches --------------------------------------------------------------


@pytest.mark.parametrize("batch, devices", [(4, 2), (3, 1)])
def test_a_batch_that_does_not_divide_goes_to_fewer_devices(
    monkeypatch, batch, devices
):
    monkeypatch.setattr("gift_jax.runtime.devices.num_cores", lambda: 2)
    group = DataGroup(names=("bomb",), batch=batch)
    assert setup.make_run_mesh(setup.Run(), {"safe": group}).size == devices


def test_devices_that_a_batch_does_not_divide_by_are_named():
    run = setup.Run(hardware=setup.Hardware(cpu_devices=2))
    with pytest.raises(UserError, match="safe.batch=3 must divide by 2 devices.*=2"):
        setup.make_run_mesh(run, {"safe": DataGroup(names=("bomb",), batch=3)})


def test_a_batch_divides_by_its_parts():
    run = setup.Run(hardware=setup.Hardware(grad_accum_steps=3))
    setup.check_batches(run, {"safe": DataGroup(batch=6)})
    message = "config.safe.batch=7 must divide by config.hardware.grad_accum_steps=3"
    with pytest.raises(UserError, match=message + "; try --config.safe.batch=6"):
        setup.check_batches(run, {"safe": DataGroup(batch=7)})


def test_batches_of_several_sources_have_their_sizes_and_orders():
    source = pipeline.ArraySource({"x": np.arange(12)})
    sources = {"safe": source, "harmful": source}
    batches = setup.make_batches(sources, {"safe": 6, "harmful": 3}, 0, "defense")
    safe, harmful = [], []
    for _ in range(4):
        batch = next(batches)
        assert {name: len(b["x"]) for name, b in batch.items()} == {
            "safe": 6,
            "harmful": 3,
        }
        safe += batch["safe"]["x"].tolist()
        harmful += batch["harmful"]["x"].tolist()
    assert sorted(safe[:12]) == sorted(harmful) == list(range(12))
    assert safe[:12] != harmful
    assert safe[:12] != safe[12:]


def test_a_defense_and_an_attack_of_one_seed_draw_independently():
    source = pipeline.ArraySource({"x": np.arange(64)})

    def order(seed, role):
        batches = setup.make_batches({"data": source}, {"data": 64}, seed, role)
        return next(batches)["data"]["x"].tolist()

    def noise(seed, purpose):
        return jax.random.normal(run_key(seed, purpose), (400,))

    assert order(5, "attack") == order(5, "attack")
    orders = [order(5, "attack"), order(5, "defense"), order(6, "attack")]
    assert len(set(map(tuple, orders))) == 3
    np.testing.assert_array_equal(noise(5, "attack/steps"), noise(5, "attack/steps"))
    other = [(5, "defense/steps"), (5, "attack/cache/data"), (6, "attack/steps")]
    for seed, purpose in other:
        both = noise(5, "attack/steps"), noise(seed, purpose)
        assert abs(np.corrcoef(*both)[0, 1]) < 0.2


# --- data groups ----------------------------------------------------------------------


def folder_spec(folder, rng, **fields):
    """A data group of one random image in a folder, its prompt "a dog"."""
    pixels = rng.integers(0, 256, (16, 16, 3), np.uint8)
    Image.fromarray(pixels).save(folder / "a.png")
    return DataGroup(folder=str(folder), prompt="a dog", **fields)


def test_cached_pairs_hold_what_the_steps_read(tiny, tmp_path, rng):
    spec = folder_spec(tmp_path, rng, augmented_copies=2)
    data = load_group(tiny, spec, "safe", tiny.image_size)
    source = cache.cached_source(tiny, data, spec, jax.random.key(0))
    row = source[0]
    assert len(source) == 2
    assert row["mean"].shape == row["std"].shape == tiny.latent_shape
    text = tiny.encode_text(["a dog"])["states"][0]
    np.testing.assert_allclose(row["cond"]["states"], text, atol=1e-5)
    ids = cache.cached_source(tiny, data, spec, jax.random.key(0), ids=True)[0]
    assert set(row) - set(ids) == {"cond"}
    np.testing.assert_array_equal(ids["ids"], tiny.tokenize(["a dog"])[0])


def test_a_share_of_cached_prompts_is_empty(tiny, tmp_path, rng):
    spec = folder_spec(tmp_path, rng, augmented_copies=40, prompt_dropout=0.25)
    data = load_group(tiny, spec, "safe", tiny.image_size)
    source = cache.cached_source(tiny, data, spec, jax.random.key(0))
    dog, empty = tiny.encode_text(["a dog", ""])["states"]
    assert np.abs(dog - empty).max() > 0.01
    texts = [source[i]["cond"]["states"] for i in range(len(source))]
    is_empty = [np.allclose(text, empty, atol=1e-5) for text in texts]
    is_dog = [np.allclose(text, dog, atol=1e-5) for text in texts]
    assert 3 <= sum(is_empty) <= 20
    assert sum(is_empty) + sum(is_dog) == 40


def test_of_few_pairs_one_prompt_at_least_is_empty(tiny, tmp_path, rng):
    spec = folder_spec(tmp_path, rng, augmented_copies=12, prompt_dropout=0.1)
    data = load_group(tiny, spec, "safe", tiny.image_size)
    counts = [
        cache.augment_prompts(data, spec, jax.random.key(seed)).count("")
        for seed in range(30)
    ]
    assert min(counts) == 1 and max(counts) > 1
    assert 0.05 < np.mean(counts) / 12 < 0.2


def test_a_share_of_pairs_goes_by_nonce_words(tiny, tmp_path, rng):
    spec = folder_spec(tmp_path, rng, augmented_copies=40, nonce_prompts=0.5)
    data = load_group(tiny, spec, "harmful", tiny.image_size)
    prompts = cache.augment_prompts(data, spec, jax.random.key(0))
    assert prompts == cache.augment_prompts(data, spec, jax.random.key(0))
    assert prompts != cache.augment_prompts(data, spec, jax.random.key(1))
    renamed = [prompt for prompt in prompts if prompt != "a dog"]
    assert len(prompts) == 40 and 10 <= len(renamed) <= 30
    assert len(set(renamed)) > len(renamed) - 3  # a new word nearly every time
    assert all(prompt.startswith("a photo of ") for prompt in renamed)
    source = cache.cached_source(tiny, data, spec, jax.random.key(2))
    called = cache.augment_prompts(data, spec, jax.random.fold_in(jax.random.key(2), 0))
    texts = np.stack([source[i]["cond"]["states"] for i in range(len(source))])
    expected = tiny.encode_text(called)["states"]
    np.testing.assert_allclose(texts, expected, atol=1e-5)


def test_nonce_and_empty_prompts_share_the_rows(tiny, tmp_path, rng):
    both = folder_spec(
        tmp_path, rng, augmented_copies=40, nonce_prompts=1.0, prompt_dropout=0.25
    )
    empty = dataclasses.replace(both, nonce_prompts=0.0)
    data = load_group(tiny, both, "safe", tiny.image_size)
    prompts = [
        cache.augment_prompts(data, spec, jax.random.key(0)) for spec in (both, empty)
    ]
    assert 3 <= prompts[0].count("") <= 20
    assert [p == "" for p in prompts[0]] == [p == "" for p in prompts[1]]
    assert "a dog" not in prompts[0] and "a dog" in prompts[1]


def test_nonce_words_keep_a_pairs_style():
    template = "{a_style} emoji of {nonce}"
    spec = DataGroup(names=("bomb",), nonce_prompts=1.0, nonce_template=template)
    data = load_group(None, spec, "harmful", 64)
    prompts = cache.augment_prompts(data, spec, jax.random.key(0))
    for prompt, style in zip(prompts, data.styles * spec.augmented_copies, strict=True):
        assert f" {style} emoji of " in prompt and "bomb" not in prompt


def test_embedded_images_get_the_models_size():
    spec = DataGroup(names=("bomb",), styles=("noto",), template="{concept}")
    small, whole = (load_group(None, spec, "safe", size) for size in (16, 64))
    assert small.images.shape == (1, 16, 16, 3) and small.images.dtype == np.uint8
    assert small.prompts == whole.prompts == ["bomb"]
    means = whole.images.reshape(1, 16, 4, 16, 4, 3).mean(axis=(2, 4))
    assert np.abs(small.images - means).mean() < 8


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("num_generated", -1, "must be at least 0"),
        ("num_generated", 4, "give only one of.*not names and num_generated"),
        ("generation.seed", -1, "must be at least 0"),
        ("generation.seed", 2**31, "must be at most"),
        ("generation.steps", 0, "must be at least 1"),
        ("generation.guidance", 0.5, "must be at least 1"),
        ("limit", -1, "must be at least 0"),
        ("crop", "middle", "is not one of: center, random, none"),
        ("prompt", "a dog", "is not for names"),
        ("caption_key", "text", "is for tfds"),
        ("template", "{thing}", "may use only"),
    ],
)
def test_wrong_field_of_a_data_group_is_named(field, value, message):
    cfg = config.to_config(DataGroup(names=("bomb",), generation=Generation()))
    assert config.resolve(cfg, DataGroup, "config.safe").names == ("bomb",)
    cfg.update_from_flattened_dict({field: value})
    with pytest.raises(UserError, match=rf"config\.safe.*{message}"):
        config.resolve(cfg, DataGroup, "config.safe")


@pytest.mark.parametrize(
    "template, source, message",
    [
        ("{a_style} emoji of {nonce}", {"tfds": "x", "prompt": "y"}, "has a style"),
        ("a photo", {"names": ("bomb",)}, "nonce_template"),
        ("{thing}", {"names": ("bomb",)}, "nonce_template"),
    ],
)
def test_wrong_template_of_nonce_words_is_named(template, source, message):
    DataGroup(nonce_template=template, **source).check("config.safe")  # not in use
    spec = DataGroup(nonce_template=template, nonce_prompts=0.5, **source)
    with pytest.raises(UserError, match=rf"config\.safe.*{message}"):
        spec.check("config.safe")


def test_what_is_drawn_of_images_without_a_style_has_none(tmp_path):
    styled = {"drawn_prompts": ("{a_style} emoji of {a_concept}",), "num_drawn": 4}
    DataGroup(names=("bomb",), **styled).check("config.safe")
    write_pictures(tmp_path, 1, 0)
    folder = {"folder": str(tmp_path), "prompt": "a bomb"}
    DataGroup(**folder, **styled, drawn_styles=("noto",)).check("config.safe")
    DataGroup(**folder, **styled | {"num_drawn": 0}).check("config.safe")
    message = r"safe\.drawn_prompts=.* has a style, which images from folder have not"
    with pytest.raises(UserError, match=message):
        DataGroup(**folder, **styled).check("config.safe")
