# SPDX-License-Identifier: Apache-2.0
"""Scores of likeness against their formulas in PyTorch and NumPy."""

import json
import shutil

import numpy as np
import pytest
from fake_backbones import fixed, numbered
from PIL import Image
from tiny_model import TINY_TEXT

from gift_jax.metrics import backbone, clip_iqa, clip_score, nearest, similarity
from gift_jax.metrics.base import EvalSet
from gift_jax.runtime.errors import UserError

PROMPTS = ["a red bird", "houses on a hill", "ten ships at sea"]


def measure(metric, model, images, **others):
    (result,) = metric.measure(EvalSet(images, **others), None, model)
    return result


@pytest.fixture
def vectors(rng):
    return rng.normal(size=(8, 5)).astype(np.float32)


def cosine(a, b):
    return a @ b / np.linalg.norm(a) / np.linalg.norm(b)


@pytest.fixture(scope="module")
def clip(tiny_folder, tmp_path_factory):
    """(CLIPModel of PyTorch, its folder)."""
    torch = pytest.importorskip("torch")
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    folder = tmp_path_factory.mktemp("clip")
    vision = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"intermediate_size": 64, "image_size": 32, "patch_size": 8}
    config = {"text_config": TINY_TEXT, "vision_config": vision, "projection_dim": 24}
    config["logit_scale_init_value"] = float(np.log(100.0))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = CLIPModel(CLIPConfig(**config)).eval()
        with torch.no_grad():
            for value in model.parameters():
                if value.ndim > 1:
                    value.copy_(0.2 * torch.randn(value.shape))
    model.save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32).save_pretrained(folder)
    for file in (tiny_folder / "tokenizer").iterdir():
        shutil.copy(file, folder)
    return model, folder


@pytest.fixture
def images(rng):
    coarse = rng.integers(0, 256, size=(3, 4, 4, 3), dtype=np.uint8)
    return np.stack([np.asarray(Image.fromarray(x).resize((48, 48))) for x in coarse])


def logits_per_image(clip, images, prompts):
    """PyTorch's, "B N"."""
    import torch
    from transformers import CLIPImageProcessor, CLIPTokenizer

    model, folder = clip
    processor = CLIPImageProcessor.from_pretrained(folder)
    x = processor(list(images), return_tensors="pt").pixel_values
    ids = CLIPTokenizer.from_pretrained(folder)(
        list(prompts), padding=True, truncation=True, max_length=16, return_tensors="pt"
    )
    with torch.no_grad():
        return model(pixel_values=x, **ids).logits_per_image


def test_clip_score_equals_pytorch(clip, images):
    logits = logits_per_image(clip, images, PROMPTS).numpy()
    expected = np.diag(logits)
    assert np.ptp(logits) > 1.0
    model = backbone.load(str(clip[1]))
    result = measure(clip_score.METRIC, model, images, prompts=PROMPTS)
    np.testing.assert_allclose(result.samples, expected, atol=1e-3)
    np.testing.assert_allclose(result.value, expected.mean(), atol=1e-3)
    assert result.name == "clip_score"
    assert result.provenance["logit_scale"] == pytest.approx(100.0)


def test_clip_iqa_is_the_softmax_over_good_and_bad(vectors, rng):
    torch = pytest.importorskip("torch")
    texts = vectors[0] + 0.02 * rng.normal(size=(2, 5)).astype(np.float32)
    x, y = (torch.nn.functional.normalize(torch.tensor(a)) for a in (vectors, texts))
    expected = (100 * x @ y.T).softmax(dim=-1)[:, 0].numpy()
    assert expected.min() < 0.4 and expected.max() > 0.6
    result = measure(
        clip_iqa.METRIC, fixed("clip", vectors, texts), numbered(*range(8))
    )
    np.testing.assert_allclose(result.samples, expected, atol=1e-5)
    assert clip_iqa.METRIC.backbones == ("clip",)


def test_clip_score_pairs_and_does_not_clip(vectors):
    model = fixed("judge", vectors, -vectors)
    result = measure(clip_score.METRIC, model, numbered(0, 1, 2), prompts=PROMPTS)
    np.testing.assert_allclose(result.samples, [-100.0] * 3, rtol=1e-5)
    assert result.value == pytest.approx(-100.0)
    assert result.name == "judge_score"


def test_clip_score_needs_a_prompt_per_image(vectors):
    model = fixed("clip", vectors, vectors)
    with pytest.raises(UserError, match="2 images, but 3 prompts"):
        measure(clip_score.METRIC, model, numbered(0, 1), prompts=PROMPTS)


@pytest.mark.parametrize("kind", ["clip", "dino", "dinov2", "judge"])
def test_similarity_is_the_mean_over_all_pairs(vectors, kind):
    model, references = fixed(kind, vectors), numbered(3, 4, 5, 6)
    result = measure(
        similarity.METRIC, model, numbered(0, 1, 2), reference_images=references
    )
    pairs = [[cosine(vectors[i], vectors[j]) for j in range(3, 7)] for i in range(3)]
    assert np.ptp(np.mean(pairs, axis=1)) > 0.1  # or the samples could be swapped
    np.testing.assert_allclose(result.samples, np.mean(pairs, axis=1), atol=1e-6)
    assert result.value == pytest.approx(np.mean(pairs), abs=1e-6)
    assert result.name == f"{kind}_image_similarity"
    assert result.provenance["references"] == 4


def test_nearest_points_at_the_copy(vectors):
    model, images = fixed("dino", vectors), numbered(0, 1, 2)
    training = numbered(3, 4, 0, 5)
    cosines, index = nearest.nearest_images(model, images, training)
    pairs = [[cosine(vectors[i], vectors[j]) for j in (3, 4, 0, 5)] for i in range(3)]
    np.testing.assert_array_equal(index, np.argmax(pairs, axis=1))
    np.testing.assert_allclose(cosines, np.max(pairs, axis=1), atol=1e-6)
    assert index[0] == 2 and cosines[0] == pytest.approx(1.0, abs=1e-6)
    assert cosines[1] < 0.99
    result = measure(nearest.METRIC, model, images, training_images=training)
    np.testing.assert_array_equal(result.samples, cosines)
    assert result.value == pytest.approx(np.mean(cosines), abs=1e-6)
    assert (result.name, result.provenance["training"]) == ("dino_nearest_train", 4)


def test_a_result_says_what_it_was_made_with(vectors):
    model = fixed("clip", vectors, vectors)
    others = {"reference_images": numbered(3, 4), "training_images": numbered(5)}
    for module in (clip_score, similarity, nearest):
        images = numbered(0, 1, 2)
        result = measure(module.METRIC, model, images, prompts=PROMPTS, **others)
        assert len(result.samples) == 3
        provenance = json.loads(json.dumps(result.as_json()))["provenance"]
        assert provenance["backbone"] == "org/name"
        assert provenance["version"] == "0123456789ab"
        assert provenance["resolution"] == 224
        assert provenance["protocol"] == "standard"
        assert "cosine" in provenance["scale"]
