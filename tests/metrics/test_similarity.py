# SPDX-License-Identifier: Apache-2.0
"""Scores of likeness against their formulas in PyTorch and NumPy."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image
from tiny_model import TINY_TEXT

from gift_jax.metrics import backbone, similarity
from gift_jax.runtime.errors import UserError

PROMPTS = ["a red bird", "houses on a hill", "ten ships at sea"]


def fixed(kind, embeddings, texts=None):
    """A Backbone whose pictures, black but for their index, have these embeddings."""
    unit = {
        name: x / np.linalg.norm(x, axis=-1, keepdims=True)
        for name, x in (("image", embeddings), ("text", texts))
        if x is not None
    }
    return backbone.Backbone(
        kind,
        "org/name",
        "0123456789ab",
        224,
        "standard",
        lambda images: unit["image"][images[:, 0, 0, 0]],
        None if texts is None else lambda prompts: unit["text"][: len(prompts)],
        None if texts is None else 100.0,
    )


def numbered(*ids):
    return np.tile(np.uint8(ids).reshape(-1, 1, 1, 1), (1, 2, 2, 3))


@pytest.fixture
def vectors(rng):
    return rng.normal(size=(8, 5)).astype(np.float32)


def cosine(a, b):
    return a @ b / np.linalg.norm(a) / np.linalg.norm(b)


def test_text_image_equals_clip_score_in_pytorch(tiny_folder, tmp_path, rng):
    torch = pytest.importorskip("torch")
    from transformers import (
        CLIPConfig,
        CLIPImageProcessor,
        CLIPModel,
        CLIPTokenizer,
    )

    vision = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"intermediate_size": 64, "image_size": 32, "patch_size": 8}
    config = {"text_config": TINY_TEXT, "vision_config": vision, "projection_dim": 24}
    config["logit_scale_init_value"] = float(np.log(100.0))
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(**config)).eval()
    with torch.no_grad():
        for value in model.parameters():
            if value.ndim > 1:
                value.copy_(0.2 * torch.randn(value.shape))
    model.save_pretrained(tmp_path)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32).save_pretrained(
        tmp_path
    )
    for file in (tiny_folder / "tokenizer").iterdir():
        shutil.copy(file, tmp_path)
    coarse = rng.integers(0, 256, size=(3, 4, 4, 3), dtype=np.uint8)
    images = np.stack([np.asarray(Image.fromarray(x).resize((48, 48))) for x in coarse])

    images_processor = CLIPImageProcessor.from_pretrained(tmp_path)
    x = images_processor(list(images), return_tensors="pt").pixel_values
    ids = CLIPTokenizer.from_pretrained(tmp_path)(
        PROMPTS, padding=True, truncation=True, max_length=16, return_tensors="pt"
    )
    with torch.no_grad():
        logits = model(pixel_values=x, **ids).logits_per_image.numpy()
    expected = np.diag(logits)
    assert np.ptp(logits) > 1.0
    found = similarity.text_image(backbone.load(str(tmp_path)), images, PROMPTS)
    np.testing.assert_allclose(found.samples, expected, atol=1e-3)
    np.testing.assert_allclose(found.value, expected.mean(), atol=1e-3)
    assert found.name == "clip_score"
    assert found.how["scale"] == "100 x cosine, not clipped at 0"
    assert found.how["logit_scale"] == pytest.approx(100.0)


def test_text_image_pairs_and_does_not_clip(vectors):
    model = fixed("judge", vectors, -vectors)
    found = similarity.text_image(model, numbered(0, 1, 2), PROMPTS)
    np.testing.assert_allclose(found.samples, [-100.0] * 3, rtol=1e-5)
    assert found.value == pytest.approx(-100.0)
    assert found.name == "judge_score"


def test_text_image_needs_texts_and_one_a_picture(vectors):
    with pytest.raises(UserError, match="embeds no texts"):
        similarity.text_image(fixed("dino", vectors), numbered(0), PROMPTS[:1])
    with pytest.raises(UserError, match="2 pictures, but 3 prompts"):
        model = fixed("clip", vectors, vectors)
        similarity.text_image(model, numbered(0, 1), PROMPTS)


@pytest.mark.parametrize("kind", ["clip", "dino", "dinov2", "judge"])
def test_image_image_is_the_mean_over_all_pairs(vectors, kind):
    found = similarity.image_image(
        fixed(kind, vectors), numbered(0, 1, 2), numbered(3, 4, 5, 6)
    )
    pairs = [[cosine(vectors[i], vectors[j]) for j in range(3, 7)] for i in range(3)]
    assert np.ptp(np.mean(pairs, axis=1)) > 0.1  # or the samples could be swapped
    np.testing.assert_allclose(found.samples, np.mean(pairs, axis=1), atol=1e-6)
    assert found.value == pytest.approx(np.mean(pairs), abs=1e-6)
    assert found.name == f"{kind}_i"
    assert found.how["references"] == 4


def test_nearest_finds_the_copy(vectors):
    model = fixed("dino", vectors)
    training = numbered(3, 4, 0, 5)
    cosines, index = similarity.nearest_pictures(model, numbered(0, 1, 2), training)
    pairs = [[cosine(vectors[i], vectors[j]) for j in (3, 4, 0, 5)] for i in range(3)]
    np.testing.assert_array_equal(index, np.argmax(pairs, axis=1))
    np.testing.assert_allclose(cosines, np.max(pairs, axis=1), atol=1e-6)
    assert index[0] == 2 and cosines[0] == pytest.approx(1.0, abs=1e-6)
    assert cosines[1] < 0.99
    found = similarity.nearest(model, numbered(0, 1, 2), training)
    np.testing.assert_array_equal(found.samples, cosines)
    assert found.value == pytest.approx(np.mean(cosines), abs=1e-6)
    assert (found.name, found.how["training"]) == ("dino_nearest", 4)


def test_a_value_says_how_it_was_made(vectors):
    model = fixed("clip", vectors, vectors)
    images, others = numbered(0, 1, 2), numbered(3, 4)
    for found in (
        similarity.text_image(model, images, PROMPTS),
        similarity.image_image(model, images, others),
        similarity.nearest(model, images, others),
    ):
        told = json.loads(json.dumps(found.as_json()))
        assert len(told["samples"]) == 3
        assert told["how"]["backbone"] == "org/name"
        assert told["how"]["version"] == "0123456789ab"
        assert told["how"]["resolution"] == 224
        assert told["how"]["protocol"] == "standard"
        assert "cosine" in told["how"]["scale"]
