# SPDX-License-Identifier: Apache-2.0
"""Models by hub id, from the hub's cache: no test reaches the network."""

import shutil

import huggingface_hub
import pytest
from huggingface_hub import constants

from gift_jax.models import hub
from gift_jax.models.load import load_model
from gift_jax.runtime.errors import UserError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty hub cache that takes the place of the user's."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    return tmp_path


def put_in_cache(cache, tiny_folder):
    repo = cache / "models--someone--tiny"
    shutil.copytree(tiny_folder, repo / "snapshots" / COMMIT)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(COMMIT)


def test_a_cached_model_needs_no_network(cache, tiny_folder):
    put_in_cache(cache, tiny_folder)
    model = load_model("someone/tiny")
    assert model.path.name == COMMIT
    assert load_model("someone/tiny", revision=COMMIT).path == model.path


@pytest.mark.parametrize(
    "name, revision", [("someone/other", ""), ("someone/tiny", "v2")]
)
def test_what_cannot_be_fetched_is_one_line(cache, tiny_folder, name, revision):
    put_in_cache(cache, tiny_folder)
    with pytest.raises(
        UserError, match=f"config.model='{name}'.*out of reach"
    ) as caught:
        load_model(name, revision=revision)
    assert "\n" not in str(caught.value)


def test_a_local_folder_comes_before_a_hub_id(tiny_folder, tmp_path, monkeypatch):
    shutil.copytree(tiny_folder, tmp_path / "someone" / "tiny")
    monkeypatch.chdir(tmp_path)
    assert str(load_model("someone/tiny").path) == "someone/tiny"


def test_only_safe_and_needed_files_are_asked_for(asked_of_hub):
    names = [
        "unet/diffusion_pytorch_model.safetensors",
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "unet/diffusion_pytorch_model.fp16-00001-of-00002.safetensors",
        "unet/diffusion_pytorch_model.safetensors.index.fp16.json",
        "unet/diffusion_pytorch_model.bin",
        "tokenizer/merges.txt",
        "model_index.json",
        "v1-5-pruned.safetensors",
        "v1-5-pruned.ckpt",
        "script.py",
    ]

    def wanted(**how):
        hub.fetch("someone/tiny", **how)
        return list(
            huggingface_hub.utils.filter_repo_objects(
                names,
                allow_patterns=asked_of_hub["allow_patterns"],
                ignore_patterns=asked_of_hub["ignore_patterns"],
            )
        )

    assert wanted() == [names[0], names[5], names[6]]
    assert wanted(variant="fp16") == [*names[:4], names[5], names[6]]
    hub.fetch("someone/tiny", "v2")
    assert asked_of_hub["revision"] == "v2"


@pytest.mark.parametrize(
    "name, expected",
    [
        ("runwayml/stable-diffusion-v1-5", True),
        ("runs/gift/export", False),
        ("/abs/path", False),
        ("../up", False),
        ("emoji-sd", False),
        ("a b/c", False),
    ],
)
def test_what_a_hub_id_looks_like(name, expected):
    assert hub.is_id(name) is expected
