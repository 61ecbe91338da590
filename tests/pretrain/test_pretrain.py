# SPDX-License-Identifier: Apache-2.0
"""Pretraining: every stage runs, and what it writes is a model that loads."""

import dataclasses
import json

import numpy as np
import pytest

from gift_jax.data.sources import emoji
from gift_jax.metrics import judge
from gift_jax.models import safetensors_io
from gift_jax.models.sd import stable_diffusion
from gift_jax.models.tokenizer import load_tokenizer
from gift_jax.pretrain import clip as clip_stage
from gift_jax.pretrain import stages
from gift_jax.pretrain import tokenizer as tokenizer_stage
from gift_jax.runtime.config import load_config
from gift_jax.runtime.errors import UserError


@pytest.mark.slow
def test_pretrain_smoke_writes_a_loadable_model(tmp_path, monkeypatch):
    every = emoji.load()
    names = ("images", "concept_ids", "style_ids", "held_out")
    some = {name: getattr(every, name)[::19] for name in names}
    monkeypatch.setattr(emoji, "load", lambda: dataclasses.replace(every, **some))
    cfg = load_config("configs/emoji_pretrain.py:smoke")
    stages.run(cfg, tmp_path)
    model = stable_diffusion.load(tmp_path / "emoji-sd")
    assert model.latent_shape == (8, 8, 8)
    assert model.scaling_factor != 1.0
    the_judge = judge.load(tmp_path / "judge")
    assert the_judge.concept_ND.shape == (480, 32)
    images = np.zeros((3, 64, 64, 3), np.uint8)
    concept, style = the_judge.name(images)
    assert concept.shape == style.shape == (3,)
    quality = json.loads((tmp_path / "quality" / "quality.json").read_text())
    assert 4 <= quality["samples"]["samples"] < 8
    assert 0 <= quality["judge_on_real_images"]["original_seen"]["concept_top1"] < 0.1
    assert np.isfinite(quality["vae"]["mean_of_images_db"])
    for stage in stages.STAGES:
        lines = (tmp_path / stage / "metrics.jsonl").read_text().splitlines()
        assert json.loads(lines[-1])["step"] == 2
    own = tmp_path / "judge" / "model.safetensors"
    names = set(safetensors_io.read_header(own))
    assert "text_projection.weight" in names
    assert not any(name.startswith("text_model.") for name in names)


def test_a_batch_that_does_not_divide_leaves_nothing_behind(tmp_path):
    cfg = load_config("configs/emoji_pretrain.py:smoke")
    cfg.unet.batch = 7
    with pytest.raises(UserError, match="unet.batch=7 must divide by 2 devices"):
        stages.run(cfg, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_described_by_matches_what_a_caption_names():
    concept = np.asarray([0, 0, 1, 1])
    style = np.asarray([0, 1, 0, 1])
    kind = np.asarray([clip_stage.BOTH, clip_stage.CONCEPT, clip_stage.STYLE, 0])
    described = np.asarray(clip_stage.described_by(concept, style, kind))
    np.testing.assert_array_equal(described[:, 0], [True, False, False, False])
    np.testing.assert_array_equal(described[:, 1], [True, True, False, False])
    np.testing.assert_array_equal(described[:, 2], [True, False, True, False])


@pytest.mark.parametrize("text", ["", "sks", "naïve 火 🔫", "a bomb, twice", "x" * 500])
def test_tokenizer_accepts_any_text(tmp_path, text):
    size = tokenizer_stage.write(tmp_path, ["a noto emoji of a bomb"], 16)
    words = load_tokenizer(tmp_path)
    ids = words(text, padding="max_length", truncation=True).input_ids
    assert len(ids) == 16 and max(ids) == size - 1 and min(ids) >= 0


def test_tokenizer_knows_caption_words_whole(tmp_path):
    tokenizer_stage.write(tmp_path, ["a noto emoji of a bomb"], 16)
    words = load_tokenizer(tmp_path)
    assert words.tokenize("a noto bomb") == ["a</w>", "noto</w>", "bomb</w>"]
    assert len(words.tokenize("noto sks")) > 2
