# SPDX-License-Identifier: Apache-2.0
"""Backbones against PyTorch's models behind their reference preprocessing."""

import functools
import json
import shutil

import numpy as np
import pytest
from PIL import Image
from tiny_model import TINY_TEXT

from gift_jax.metrics import backbone, judge, preprocessing
from gift_jax.metrics.base import UnavailableError
from gift_jax.models import safetensors_io, vision
from gift_jax.models.tokenizer import load_tokenizer
from gift_jax.runtime.errors import UserError

TOLERANCE = 1e-4
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
CLIP_MEAN = [0.48145466, 0.4578275, 0.40821073]
CLIP_STD = [0.26862954, 0.26130258, 0.27577711]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
load = functools.cache(backbone.load)  # compiled once for all tests that change nothing


def write(model, processor, folder):
    """Saves a PyTorch model with weights that matter, and a processor's config."""
    import torch

    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in model.named_parameters():
            noise = torch.randn(value.shape, generator=generator)
            if name != "logit_scale":
                value.copy_(0.2 * noise + (value.ndim == 1 and "bias" not in name))
    model.eval().save_pretrained(folder)
    processor.save_pretrained(folder)
    return model, folder


@pytest.fixture(scope="module")
def clip(tmp_path_factory, tiny_folder):
    """(CLIPModel, its folder): 32 pixels, from any short side of 36."""
    pytest.importorskip("torch")
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    vision = SIZES | {"image_size": 32, "patch_size": 8, "hidden_act": "quick_gelu"}
    vision |= {"intermediate_size": 64, "layer_norm_eps": 1e-3}
    config = {"text_config": TINY_TEXT, "vision_config": vision, "projection_dim": 24}
    processor = CLIPImageProcessor(size={"shortest_edge": 36}, crop_size=32)
    folder = tmp_path_factory.mktemp("clip")
    for file in (tiny_folder / "tokenizer").iterdir():
        shutil.copy(file, folder)
    return write(CLIPModel(CLIPConfig(**config)), processor, folder)


@pytest.fixture(scope="module")
def dino(tmp_path_factory):
    """(ViTModel, its folder) as DINO's: no crop in the file, a pooler of no use."""
    pytest.importorskip("torch")
    from transformers import ViTConfig, ViTImageProcessor, ViTModel

    config = ViTConfig(**SIZES, intermediate_size=64, image_size=56, patch_size=14)
    processor = ViTImageProcessor(size={"height": 56, "width": 56}, **IMAGENET)
    return write(ViTModel(config), processor, tmp_path_factory.mktemp("dino"))


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory):
    """(Dinov2Model, its folder): learned at 42 pixels, used at 28."""
    pytest.importorskip("torch")
    from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

    config = Dinov2Config(
        **SIZES, mlp_ratio=2, image_size=42, patch_size=7, layerscale_value=0.5
    )
    processor = BitImageProcessor(size={"shortest_edge": 32}, crop_size=28, **IMAGENET)
    return write(Dinov2Model(config), processor, tmp_path_factory.mktemp("dinov2"))


@pytest.fixture
def models(clip, dino, dinov2):
    return {"clip": clip, "dino": dino, "dinov2": dinov2}


@pytest.fixture
def pictures(rng):
    """Three smooth pictures "B H W 3" that have little in common."""
    coarse = rng.integers(0, 256, size=(3, 5, 7, 3), dtype=np.uint8)
    return np.stack([np.asarray(Image.fromarray(x).resize((71, 50))) for x in coarse])


def reference(kind, folder):
    """The reference's preprocessor of this kind of backbone."""
    from transformers import BitImageProcessor, CLIPImageProcessor

    if kind == "clip":
        return CLIPImageProcessor.from_pretrained(folder)
    if kind == "dinov2":
        return BitImageProcessor.from_pretrained(folder)
    return BitImageProcessor(
        size={"shortest_edge": 64}, crop_size=56, resample=3, **IMAGENET
    )


def theirs(kind, model, x):
    """PyTorch's unit embeddings of preprocessed pictures."""
    import torch

    with torch.no_grad():
        if kind == "clip":
            pooled = model.vision_model(torch.as_tensor(x)).pooler_output
            y = model.visual_projection(pooled)
        else:
            y = model(torch.as_tensor(x)).last_hidden_state[:, 0]
    return (y / y.norm(dim=-1, keepdim=True)).numpy()


def assert_spread(x_BD):
    """The pictures' embeddings differ by far more than the tolerance."""
    apart = np.abs(x_BD[:, None] - x_BD[None, :]).max(axis=-1)
    assert apart[~np.eye(len(x_BD), dtype=bool)].min() > 100 * TOLERANCE


@pytest.mark.parametrize("kind", ["clip", "dino", "dinov2"])
@pytest.mark.parametrize("turned", [False, True])
def test_images_equal_pytorch_behind_the_reference_processor(
    models, pictures, kind, turned
):
    model, folder = models[kind]
    images = np.swapaxes(pictures, 1, 2) if turned else pictures
    x = reference(kind, folder)(list(images), return_tensors="np").pixel_values
    expected = theirs(kind, model, x)
    assert_spread(expected)
    loaded = load(str(folder))
    ours = loaded.images(images)
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, expected, atol=TOLERANCE)
    assert (loaded.kind, loaded.resolution) == (kind, x.shape[-1])
    assert loaded.provenance["protocol"] == "standard"
    assert len(loaded.version) == 12


@pytest.mark.parametrize("kind", ["clip", "dino", "dinov2"])
def test_imma_64px_equals_its_rendering_in_pytorch(models, pictures, kind):
    import torch

    model, folder = models[kind]
    side = {"clip": 32, "dino": 56, "dinov2": 28}[kind]
    small = [Image.fromarray(x).resize((64, 64), Image.BILINEAR) for x in pictures]
    x = torch.tensor(np.stack([np.asarray(s) for s in small])).permute(0, 3, 1, 2)
    x = (x.float() / 255 - (-1.0)) / 2.0  # Normalize(mean=-1, std=2), of [0, 1]
    assert x.min() >= 0.5
    x = torch.nn.functional.interpolate(x, (side, side), mode="bicubic")
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (CLIP_MEAN, CLIP_STD))
    expected = theirs(kind, model, (x - mean) / std)
    assert_spread(expected)
    standard = load(str(folder)).images(pictures)
    assert np.abs(standard - expected).max() > 100 * TOLERANCE
    ours = backbone.load(str(folder), "imma-64px")
    np.testing.assert_allclose(ours.images(pictures), expected, atol=TOLERANCE)
    assert ours.provenance["protocol"] == "imma-64px"


@pytest.mark.parametrize("before, after", [(64, 224), (37, 16), (9, 9)])
def test_cubic_matrix_equals_pytorch(rng, before, after):
    torch = pytest.importorskip("torch")
    x = rng.normal(size=(1, 1, before, before)).astype(np.float32)
    expected = torch.nn.functional.interpolate(
        torch.tensor(x), (after, after), mode="bicubic", align_corners=False
    )
    matrix = preprocessing.cubic_matrix(before, after)
    np.testing.assert_allclose(matrix @ x[0, 0] @ matrix.T, expected[0, 0], atol=1e-5)


@pytest.mark.parametrize("shape", [(50, 71), (71, 50), (20, 33), (36, 36)])
def test_standard_pixels_equal_the_processor(clip, rng, shape):
    images = rng.integers(0, 256, size=(1, *shape, 3), dtype=np.uint8)
    expected = reference("clip", clip[1])(list(images), return_tensors="np")
    ours = preprocessing.standard(images, preprocessing.read(clip[1]))
    np.testing.assert_allclose(ours, expected.pixel_values, atol=1e-6)


def test_texts_equal_pytorch(clip):
    import torch
    from transformers import CLIPTokenizer

    model, folder = clip
    texts = ["a red bird", "houses", "a bird " * 30]
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    ids = tokenizer(
        texts, padding=True, truncation=True, max_length=16, return_tensors="pt"
    )
    with torch.no_grad():
        pooled = model.text_model(**ids).pooler_output
        expected = model.text_projection(pooled)
    expected = (expected / expected.norm(dim=-1, keepdim=True)).numpy()
    assert_spread(expected)
    loaded = load(str(folder))
    np.testing.assert_allclose(loaded.texts(texts), expected, atol=TOLERANCE)
    np.testing.assert_allclose(loaded.logit_scale, model.logit_scale.exp().item(), 1e-5)


def test_features_are_of_whole_images_and_as_the_model_gives_them(models, pictures):
    """As dgm-eval makes FD-DINOv2's: squeezed to the square, not normalized."""
    import torch

    model, folder = models["dinov2"]
    squares = [Image.fromarray(x).resize((28, 28), Image.BICUBIC) for x in pictures]
    mean, std = (np.array(IMAGENET[f"image_{k}"]) for k in ("mean", "std"))
    x = (np.stack([np.asarray(s) for s in squares]) / 255 - mean) / std
    x_BCHW = torch.tensor(x.transpose(0, 3, 1, 2), dtype=torch.float32)
    with torch.no_grad():
        expected = model(x_BCHW).pooler_output.numpy()
    ours = load(str(folder)).features(pictures)
    assert np.linalg.norm(expected, axis=1).min() > 2
    np.testing.assert_allclose(ours, expected, atol=10 * TOLERANCE)
    cropped = load(str(folder)).images(pictures)
    assert np.abs(backbone.unit(ours) - cropped).max() > 100 * TOLERANCE


def test_the_judge_shares_the_models_text_encoder(tmp_path):
    own = judge.FOLDER / "model.safetensors"
    shared = judge.FOLDER.parent / "emoji-sd" / "text_encoder" / own.name
    names = [set(safetensors_io.read_header(file)) for file in (own, shared)]
    assert len(names[0]) == 37 and len(names[1]) == 52 and not names[0] & names[1]
    model = backbone.load("judge")
    assert (model.kind, model.resolution) == ("judge", 64)
    similarity = model.texts(["a noto emoji of a bomb"]) @ model.texts(["bomb"]).T
    assert 0.1 < similarity.item() < 0.99
    elsewhere = tmp_path / "judge"
    shutil.copytree(judge.FOLDER, elsewhere)
    with pytest.raises(UserError, match="emoji-sd.text_encoder"):
        backbone.load(str(elsewhere))
    shutil.copytree(judge.FOLDER.parent / "emoji-sd", tmp_path / "emoji-sd")
    assert backbone.load(str(elsewhere)).version == model.version
    with pytest.raises(UserError, match="judge knows standard only"):
        backbone.load("judge", "imma-64px")


def test_dino_without_a_pooler_loads(dino, pictures, tmp_path):
    from transformers import ViTModel

    bare = ViTModel.from_pretrained(dino[1], add_pooling_layer=False)
    bare.save_pretrained(tmp_path)
    shutil.copy(dino[1] / "preprocessor_config.json", tmp_path)
    expected = load(str(dino[1])).images(pictures)
    model = backbone.load(str(tmp_path))
    np.testing.assert_array_equal(model.images(pictures), expected)
    assert model.texts is None and model.logit_scale is None


def test_any_number_of_pictures_compiles_once(dino, pictures, monkeypatch):
    traced, apply = [], vision.apply_vision
    monkeypatch.setattr(
        vision, "apply_vision", lambda *args: traced.append(0) or apply(*args)
    )
    embed = backbone.load(str(dino[1])).images
    many = np.tile(pictures, (2 * backbone.BATCH, 1, 1, 1))[: 2 * backbone.BATCH + 1]
    x_BD = embed(many)
    assert x_BD.shape == (len(many), 32)
    np.testing.assert_allclose(embed(many[:1]), x_BD[:1], atol=1e-6)
    np.testing.assert_allclose(embed(many[-1:]), x_BD[-1:], atol=1e-6)
    assert len(traced) == 1


def test_pictures_of_another_form_are_refused(dino, pictures):
    embed = load(str(dino[1])).images
    with pytest.raises(UserError, match="at least one is needed"):
        embed(pictures[:0])
    for wrong in (pictures.astype(np.float32), pictures[0], pictures[..., :1]):
        with pytest.raises(ValueError, match="not uint8 'B H W 3'"):
            embed(wrong)


# --- what a user may get wrong --------------------------------------------------------


def copy_with(folder, out, **changed):
    """A copy of a backbone's folder, with fields of its JSON files changed."""
    shutil.copytree(folder, out)
    for name, fields in changed.items():
        file = out / f"{name}.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | fields))
    return str(out)


def test_tokenizer_json_is_enough(clip, tmp_path):
    texts = ["a photo", "一只猫", ""]
    spec = copy_with(clip[1], tmp_path / "copy")
    expected = backbone.load(spec).texts(texts)
    load_tokenizer(spec, any_length=True).save_pretrained(spec)
    (tmp_path / "copy" / "vocab.json").unlink(missing_ok=True)
    (tmp_path / "copy" / "merges.txt").unlink(missing_ok=True)
    np.testing.assert_array_equal(backbone.load(spec).texts(texts), expected)


@pytest.mark.parametrize(
    "name",
    ["config.json", "preprocessor_config.json", "vocab.json", "merges.txt"]
    + ["model.safetensors"],
)
def test_a_missing_file_is_named(clip, tmp_path, name):
    spec = copy_with(clip[1], tmp_path / "copy")
    (tmp_path / "copy" / name).unlink()
    with pytest.raises(UnavailableError, match=f"copy/{name} is missing") as caught:
        backbone.load(spec)
    assert "\n" not in str(caught.value)


def test_a_missing_shard_is_named(dino, tmp_path):
    spec = copy_with(dino[1], tmp_path / "copy")
    (tmp_path / "copy" / "model.safetensors").unlink()
    index = {"weight_map": {"layernorm.weight": "model-00001-of-00001.safetensors"}}
    file = tmp_path / "copy" / "model.safetensors.index.json"
    file.write_text(json.dumps(index))
    with pytest.raises(UnavailableError, match="model-00001-of-00001.safetensors is"):
        backbone.load(spec)


def test_a_pickle_is_never_loaded(dino, tmp_path):
    spec = copy_with(dino[1], tmp_path / "copy")
    weights = tmp_path / "copy" / "model.safetensors"
    weights.rename(weights.with_name("pytorch_model.bin"))
    with pytest.raises(UnavailableError, match="only pytorch_model.bin, a pickle"):
        backbone.load(spec)


@pytest.mark.parametrize(
    "file, fields, message",
    [
        ("config", {"architectures": ["CLIPTextModel"]}, "must be one of CLIPModel"),
        ("config", {"architectures": None, "model_type": "bert"}, "has 'bert'"),
        ("config", {"hidden_act": "laplace"}, "hidden_act='laplace' is not supp"),
        ("config", {"intermediate_size": 48}, "but config.json says"),
        ("preprocessor_config", {"do_rescale": False}, "do_rescale=false is not"),
        ("preprocessor_config", {"image_mean": [0.5]}, "must be three numbers"),
        ("preprocessor_config", {"do_center_crop": True}, "crop_size=None must say"),
        (
            "preprocessor_config",
            {"crop_size": 28, "size": 32, "do_center_crop": True},
            "makes 28 pixels a side, but config.json says image_size=56",
        ),
        (
            "preprocessor_config",
            {"crop_size": 56, "size": 32, "do_center_crop": True},
            "size must be at least crop_size",
        ),
    ],
)
def test_an_unsupported_setting_is_named(dino, tmp_path, file, fields, message):
    spec = copy_with(dino[1], tmp_path / "copy", **{file: fields})
    with pytest.raises(UserError, match=message) as caught:
        backbone.load(spec)
    assert not isinstance(caught.value, UnavailableError)


def test_clip_must_crop(clip, tmp_path):
    fields = {"do_center_crop": False}
    spec = copy_with(clip[1], tmp_path / "copy", preprocessor_config=fields)
    with pytest.raises(UserError, match="do_center_crop must be true"):
        backbone.load(spec)


def test_an_unknown_protocol_is_refused():
    with pytest.raises(UserError, match="must be one of standard, imma-64px"):
        backbone.load("judge", "imma")


def test_no_such_folder_says_what_to_put_there(tmp_path):
    with pytest.raises(UnavailableError, match="no such folder; put config.json"):
        backbone.load(str(tmp_path / "none"))


# --- by hub id ------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty hub cache that takes the place of the user's."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("spec", ["someone/clip", "someone/clip@refs/pr/1"])
def test_a_hub_id_out_of_reach_says_what_to_do(cache, spec):
    with pytest.raises(
        UnavailableError, match="backbone='someone/clip'.*out of reach; or put config"
    ) as caught:
        backbone.load(spec)
    assert "\n" not in str(caught.value)


def test_a_cached_hub_id_is_loaded(cache, dino, pictures):
    repo = cache / "models--someone--dino"
    shutil.copytree(dino[1], repo / "snapshots" / COMMIT)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(COMMIT)
    expected = load(str(dino[1]))
    model = backbone.load("someone/dino")
    assert (model.name, model.version) == ("someone/dino", expected.version)
    np.testing.assert_array_equal(model.images(pictures), expected.images(pictures))
    assert backbone.load(f"someone/dino@{COMMIT}").name == f"someone/dino@{COMMIT}"


def test_the_hub_is_asked_for_no_pickle(asked_of_hub):
    import huggingface_hub

    with pytest.raises(UnavailableError, match="config.json is missing"):
        backbone.load("someone/clip@v2")
    names = ["config.json", "model.safetensors", "merges.txt", "pytorch_model.bin"]
    names += ["flax_model.msgpack", "onnx/model.safetensors", "model.fp16.safetensors"]
    wanted = huggingface_hub.utils.filter_repo_objects(
        names, allow_patterns=asked_of_hub["allow_patterns"]
    )
    assert list(wanted) == names[:3]
    assert asked_of_hub["revision"] == "v2"
