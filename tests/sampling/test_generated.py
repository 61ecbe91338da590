# SPDX-License-Identifier: Apache-2.0
"""Training images that the model draws itself."""

import dataclasses
import hashlib
import json

import numpy as np
import pytest
from PIL import Image

from gift_jax.data.cache import DataGroup, Generation
from gift_jax.models import weights
from gift_jax.runtime.errors import UserError
from gift_jax.sampling import images
from gift_jax.sampling.generated import load_group
from gift_jax.sampling.images import Samples, draw_images


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The cache folder of this test, empty."""
    monkeypatch.setenv("GIFT_JAX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "generated"


@pytest.fixture
def drawn(monkeypatch):
    """(first number, images) of every call of draw_images."""
    calls, draw = [], draw_images

    def spy(model, prompts, cfg, number=0):
        calls.append((number, len(prompts)))
        return draw(model, prompts, cfg, number)

    monkeypatch.setattr(images, "draw_images", spy)
    return calls


def drawing(**fields):
    """A data group of five images in batches of two, the last one padded."""
    generation = Generation(**{"steps": 2} | fields.pop("generation", {}))
    fields = dict(num_generated=5, prompt="a dog", batch=2) | fields
    return DataGroup(generation=generation, **fields)


def files(cache):
    return {path.relative_to(cache): path.read_bytes() for path in cache.rglob("*.*")}


def test_generated_images_are_the_models_own_and_kept(tiny, cache, drawn):
    spec = drawing(generation=dict(seed=3, guidance=2.0))
    data = load_group(tiny, spec, "safe", tiny.image_size)
    assert drawn == [(0, 2), (2, 2), (4, 2)]
    samples = Samples(seed=3, guidance=2.0, steps=2, batch=2)
    expected = draw_images(tiny, ["a dog"] * 5, samples)
    np.testing.assert_array_equal(data.images, expected)
    assert len(np.unique(data.images, axis=0)) == 5
    assert data.prompts == ["a dog"] * 5
    (folder,) = cache.iterdir()
    names = [f"{i:05d}.png" for i in range(5)]
    assert sorted(p.name for p in folder.iterdir()) == [*names, "settings.json"]
    for name, image in zip(names, data.images, strict=True):
        with Image.open(folder / name) as kept:
            np.testing.assert_array_equal(np.asarray(kept), image)
    text = (folder / "settings.json").read_bytes()
    assert folder.name == hashlib.sha256(text).hexdigest()
    settings = json.loads(text)
    assert settings["model_sha256"] == weights.content_hash(tiny.path)
    assert settings["prompt"] == "a dog" and settings["seed"] == 3


def test_generated_images_are_drawn_once(tiny, cache, drawn):
    first = load_group(tiny, drawing(), "safe", tiny.image_size)
    kept = files(cache)
    drawn.clear()
    again = load_group(tiny, drawing(batch=3), "harmful", tiny.image_size)
    fewer = load_group(tiny, drawing(limit=2), "safe", tiny.image_size)
    assert not drawn and files(cache) == kept
    np.testing.assert_array_equal(first.images, again.images)
    np.testing.assert_array_equal(first.images[:2], fewer.images)
    more = load_group(tiny, drawing(num_generated=6), "safe", tiny.image_size)
    assert drawn == [(5, 1)]
    np.testing.assert_array_equal(first.images, more.images[:5])


def test_interrupted_generation_draws_what_is_missing(tiny, cache, monkeypatch):
    straight = load_group(tiny, drawing(), "safe", tiny.image_size)
    kept = files(cache)
    for path in cache.rglob("0000[0-9].png"):
        path.unlink()
    calls, draw = [], draw_images

    def stops(*args):
        calls.append(args[-1])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return draw(*args)

    monkeypatch.setattr(images, "draw_images", stops)
    with pytest.raises(KeyboardInterrupt):
        load_group(tiny, drawing(), "safe", tiny.image_size)
    assert len(list(cache.rglob("*.png"))) == 2
    resumed = load_group(tiny, drawing(), "safe", tiny.image_size)
    assert calls == [0, 2, 2, 4]
    assert files(cache) == kept
    np.testing.assert_array_equal(straight.images, resumed.images)


@pytest.mark.parametrize(
    "fields, model",
    [
        (dict(prompt="a cat"), {}),
        (dict(generation=dict(seed=1)), {}),
        (dict(generation=dict(steps=3)), {}),
        (dict(generation=dict(guidance=1.5)), {}),
        ({}, dict(variant="fp16")),
        ({}, dict(latent_shape=(4, 12, 12))),
    ],
)
def test_other_settings_are_drawn_and_kept_apart(
    tiny, cache, monkeypatch, fields, model
):
    asked = []

    def draw(model, prompts, cfg, number):
        asked.append((prompts, dataclasses.asdict(cfg)))
        return np.zeros((len(prompts), model.image_size, model.image_size, 3), np.uint8)

    monkeypatch.setattr(images, "draw_images", draw)
    load_group(tiny, drawing(num_generated=1), "safe", 16)
    load_group(tiny.replace(**model), drawing(num_generated=1, **fields), "safe", 16)
    assert len(list(cache.iterdir())) == 2
    assert len(asked) == 2
    if fields:
        assert asked[0] != asked[1]


def test_generation_names_its_mistakes(tiny, cache, monkeypatch, tmp_path):
    with pytest.raises(UserError, match="config.safe.prompt is empty"):
        load_group(tiny, drawing(prompt=""), "safe", 16)
    with pytest.raises(UserError, match="config.safe.generation.steps=1001 must be"):
        load_group(tiny, drawing(generation=dict(steps=1001)), "safe", 16)
    assert not cache.exists()
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GIFT_JAX_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match="cannot be written.*set GIFT_JAX_CACHE"):
        load_group(tiny, drawing(num_generated=1), "safe", 16)


def test_pairs_that_the_model_draws_besides(tiny, cache, drawn):
    """In every style that is asked for, whatever those of the images that are read."""
    spec = drawing(
        num_generated=0,
        prompt="",
        names=("anchor", "crown"),
        styles=("noto",),
        drawn_styles=("noto", "fluent"),
        num_drawn=5,
        drawn_prompts=("{a_style} emoji of {a_concept}",),
    )
    plain = dataclasses.replace(spec, num_drawn=0)
    read = load_group(tiny, plain, "harmful", tiny.image_size)
    assert not drawn and not cache.exists()
    data = load_group(tiny, spec, "harmful", tiny.image_size)
    np.testing.assert_array_equal(data.images[: len(read)], read.images)
    assert data.prompts[len(read) :] == [
        "a noto emoji of an anchor",
        "a noto emoji of a crown",
        "a fluent emoji of an anchor",
        "a fluent emoji of a crown",
        "a noto emoji of an anchor",
    ]
    assert data.concepts[len(read) :] == ["anchor", "crown"] * 2 + ["anchor"]
    assert data.styles[len(read) :] == ["noto"] * 2 + ["fluent"] * 2 + ["noto"]
    assert data.may_flip[len(read) :].all()
    samples = Samples(seed=0, steps=2, batch=2)
    prompts = data.prompts[len(read) :]
    expected = draw_images(tiny, prompts, samples)
    np.testing.assert_array_equal(data.images[len(read) :], expected)
    assert data.concept_names == ("anchor", "crown")


def test_drawn_prompts_name_their_mistakes():
    for prompts, match in (
        (("{cat}",), r"drawn_prompts='\{cat\}' may use only"),
        ((), "drawn_prompts is empty"),
    ):
        spec = drawing(num_drawn=1, drawn_prompts=prompts)
        with pytest.raises(UserError, match=match):
            spec.check("config.safe")
