# SPDX-License-Identifier: Apache-2.0
"""The model card of an export says what was done, to what, and its limits."""

import json

import pytest

from gift_jax.models import model_card
from gift_jax.runtime.config import load_config

CONFIGS = {
    "gift": "configs/emoji_gift.py",
    "uce": "configs/emoji_baselines.py:uce",
    "lora": "configs/emoji_attack.py",
    "dreambooth": "configs/emoji_attack.py:dreambooth",
    "textual_inversion": "configs/emoji_attack.py:textual_inversion",
}


@pytest.fixture
def recorded(request, pytestconfig, monkeypatch):
    """The config.json of a run, here of a model in a folder of its maker's machine."""
    monkeypatch.chdir(pytestconfig.rootpath)
    cfg = load_config(CONFIGS[request.param])
    cfg.model = "/home/somebody/secret/base-model"
    if "uce" in CONFIGS[request.param]:
        cfg.safe.names = tuple("abcdefgh")
    made = json.loads(json.dumps(cfg.to_dict()))
    return made | {"base_sha256": "0123abcd"}


def front_matter(text):
    lines = text.split("---\n")[1].splitlines()
    return dict(line.split(": ", 1) for line in lines)


@pytest.mark.parametrize("recorded", ["gift"], indirect=True)
def test_card_of_an_immunized_model(recorded, tmp_path):
    metrics = {"step": 500, "time/step_s": 0.2, "upper/loss": -1.23456}
    text = model_card.card(recorded, tmp_path, metrics=metrics)
    assert front_matter(text)["tags"] == "[gift_jax, immunized]"
    assert "Method: GIFT (Gradient-aware Immunization, arXiv 2507.13598)" in text
    assert "`base-model`" in text and "`0123abcd`" in text
    assert "secret" not in text and "somebody" not in text
    assert "What it should not learn: bomb (styles: all)" in text
    assert "stay able to learn: known-safe (styles: all)" in text
    assert "After step 500, of" in text
    assert "| upper/loss | -1.235 |" in text and "time/step_s |" not in text
    assert "it does not make it impossible" in text
    assert "Steps: 500, then 100 of fine-tuning on safe data" in text
    shown = text.split("```json\n")[1].split("\n```")[0]
    assert json.loads(shown) == recorded | {"model": "base-model"}
    assert "\n\n\n" not in text


@pytest.mark.parametrize("recorded", ["uce"], indirect=True)
def test_card_of_an_edited_model_tells_of_no_steps(recorded, tmp_path):
    text = model_card.card(recorded, tmp_path)
    assert "Steps: none, but one solution in closed form" in text
    assert "After step" not in text
    assert "stay able to learn: a, b, c, d, e and 3 more (styles: all)" in text


@pytest.mark.parametrize(
    "recorded, trained",
    [
        ("lora", "updates of rank 8 of the UNet's attention"),
        ("dreambooth", "the whole UNet"),
        ("textual_inversion", "embeddings of a new word"),
    ],
    indirect=["recorded"],
)
def test_card_of_an_attacked_model_says_that_it_is_one(recorded, tmp_path, trained):
    text = model_card.card(recorded, tmp_path)
    assert "**Not for release**" in text and f"Trained: {trained}." in text
    assert front_matter(text)["tags"] == "[gift_jax, attacked]"
    assert "impossible" not in text


@pytest.mark.parametrize("recorded", ["gift"], indirect=True)
@pytest.mark.parametrize(
    "head, licence",
    [
        (
            "---\nlicense: creativeml-openrail-m\ntags: [a]\n---\n# A",
            "creativeml-openrail-m",
        ),
        ("# A model\nlicense: mit", ""),
        ("---\nlicense: |\n  much text\n---", ""),
    ],
)
def test_licence_of_the_base_travels(recorded, tmp_path, head, licence):
    (tmp_path / "README.md").write_text(head)
    assert model_card.license_of(tmp_path) == licence
    text = model_card.card(recorded, tmp_path)
    assert front_matter(text).get("license", "") == licence
    assert "Its restrictions hold for" in text


def test_pictures_of_a_folder_are_told_without_their_place(pytestconfig, monkeypatch):
    monkeypatch.chdir(pytestconfig.rootpath)
    cfg = load_config(CONFIGS["lora"])
    cfg.data.update(names=(), folder="/home/somebody/faces", prompt="a sks person")
    text = model_card.card(json.loads(json.dumps(cfg.to_dict())), pytestconfig.rootpath)
    assert "faces (folder), all under 'a sks person'" in text
    assert "somebody" not in text
