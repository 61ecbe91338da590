# SPDX-License-Identifier: Apache-2.0
"""The model card of an export says what was done, to what, and its limits."""

import dataclasses
import json

import pytest

from gift_jax import attack, train
from gift_jax.models import model_card
from gift_jax.models.folder import ModelFolder
from gift_jax.runtime.config import load_config

CONFIGS = {
    "gift": "configs/emoji_gift.py",
    "gift_adversarial": "configs/emoji_gift_adversarial.py",
    "gift_gate": "configs/emoji_gift_gate.py",
    "uce": "configs/emoji_baselines.py:uce",
    "lora": "configs/emoji_attack.py",
    "dreambooth": "configs/emoji_attack.py:dreambooth",
    "textual_inversion": "configs/emoji_attack.py:textual_inversion",
}


@dataclasses.dataclass(frozen=True)
class Run:
    """The config.json of a run, here of a model in a folder of its maker's machine."""

    recorded: dict
    summary: model_card.RunSummary

    def card(self, folder, **kwargs):
        return model_card.card(self.recorded, folder, self.summary, **kwargs)


@pytest.fixture
def run(request, pytestconfig, monkeypatch):
    monkeypatch.chdir(pytestconfig.rootpath)
    cfg = load_config(CONFIGS[request.param])
    cfg.model = "/home/somebody/secret/base-model"
    if request.param == "uce":
        cfg.safe.names = tuple("abcdefgh")
    command = {"train": train, "attack": attack}[cfg.kind]
    summary = command.summary(command.resolve(cfg, with_data=False))
    recorded = json.loads(json.dumps(cfg.to_dict())) | {"base_sha256": "0123abcd"}
    return Run(recorded, summary)


def front_matter(text):
    lines = text.split("---\n")[1].splitlines()
    return dict(line.split(": ", 1) for line in lines)


@pytest.mark.parametrize("run", ["gift"], indirect=True)
def test_card_of_an_immunized_model(run, tmp_path):
    metrics = {"step": 500, "time/step_s": 0.2, "upper/loss": -1.23456}
    text = run.card(tmp_path, metrics=metrics)
    assert front_matter(text)["tags"] == "[gift_jax, immunized]"
    assert "Method: GIFT (Gradient-aware Immunization, arXiv:2507.13598)" in text
    assert "`base-model`" in text and "`0123abcd`" in text
    assert "secret" not in text and "somebody" not in text
    assert "What it should not learn: bomb (styles: all)" in text
    assert "stay able to learn: known-safe (styles: all)" in text
    assert "After step 500, of" in text
    assert "| upper/loss | -1.235 |" in text and "time/step_s |" not in text
    assert "it does not make it impossible" in text
    assert "Trained: the UNet's cross-attention." in text
    assert "Steps: 500." in text
    shown = text.split("```json\n")[1].split("\n```")[0]
    assert json.loads(shown) == run.recorded | {"model": "base-model"}
    assert "\n\n\n" not in text


@pytest.mark.parametrize("run", ["gift_adversarial"], indirect=True)
def test_card_has_the_steps_that_follow(run, tmp_path):
    text = run.card(tmp_path)
    assert "Steps: 500, then 100 of fine-tuning on safe data" in text


@pytest.mark.parametrize("run", ["gift_gate"], indirect=True)
def test_card_states_the_worst_case_that_was_measured(run, tmp_path):
    text = run.card(tmp_path)
    assert "Trained: the whole UNet." in text
    worst = text.split("the worst case over attacks\nof 150 steps: ")[1]
    assert worst.startswith("100% after an attack that first removes")
    assert "\n\n\n" not in text


@pytest.mark.parametrize("run", ["uce"], indirect=True)
def test_card_of_an_edited_model_has_no_steps(run, tmp_path):
    text = run.card(tmp_path)
    assert "Steps: none, but one solution in closed form" in text
    assert "After step" not in text
    assert "stay able to learn: a, b, c, d, e and 3 more (styles: all)" in text


@pytest.mark.parametrize(
    "run, trained",
    [
        ("lora", "updates of rank 8 of the network's attention"),
        ("dreambooth", "the whole UNet"),
        ("textual_inversion", "embeddings of a new word"),
    ],
    indirect=["run"],
)
def test_card_of_an_attacked_model_says_that_it_is_one(run, tmp_path, trained):
    text = run.card(tmp_path)
    assert "**Not for release**" in text and f"Trained: {trained}." in text
    assert front_matter(text)["tags"] == "[gift_jax, attacked]"
    assert "impossible" not in text


@pytest.mark.parametrize("run", ["dreambooth"], indirect=True)
def test_card_calls_the_denoiser_by_its_name(run, tmp_path):
    (tmp_path / "transformer").mkdir()
    text = run.card(tmp_path)
    assert "Trained: the whole transformer." in text and "UNet" not in text


@pytest.mark.parametrize("run", ["gift"], indirect=True)
@pytest.mark.parametrize(
    "head, license",
    [
        (
            "---\nlicense: creativeml-openrail-m\ntags: [a]\n---\n# A",
            "creativeml-openrail-m",
        ),
        ("# A model\nlicense: mit", ""),
        ("---\nlicense: |\n  much text\n---", ""),
    ],
)
def test_license_of_the_base_travels(run, tmp_path, head, license):
    (tmp_path / "README.md").write_text(head)
    assert model_card.license_of(tmp_path) == license
    text = run.card(tmp_path)
    assert front_matter(text).get("license", "") == license
    assert "Its restrictions hold for" in text


@pytest.mark.parametrize("run", ["lora"], indirect=True)
def test_images_of_a_folder_are_named_without_their_place(run, tmp_path):
    source = {"names": [], "folder": "/home/somebody/faces", "prompt": "a sks person"}
    run.recorded["data"].update(source)
    text = run.card(tmp_path)
    assert "faces (folder), all under 'a sks person'" in text
    assert "somebody" not in text


@pytest.mark.parametrize("run", ["gift_gate"], indirect=True)
def test_card_has_what_every_phase_measured(run, tmp_path):
    (tmp_path / "preserve").mkdir()
    (tmp_path / "config.json").write_text(json.dumps(run.recorded))
    for folder, name in (
        (tmp_path, "upper/loss"),
        (tmp_path / "preserve", "lower/loss"),
    ):
        lines = [json.dumps({"step": n, name: float(n)}) for n in (1, 2)]
        (folder / "metrics.jsonl").write_text("\n".join(lines))
    other = tmp_path / "zz"  # a run of its own in the folder
    other.mkdir()
    (other / "config.json").write_text("{}")
    (other / "metrics.jsonl").write_text(json.dumps({"step": 9, "attack/loss": 1.0}))
    base = ModelFolder(tmp_path)
    card = model_card.of_run(tmp_path, base, run.summary)
    assert "upper/loss" in card and "lower/loss" in card and "attack/loss" not in card
    assert "After the last step of each phase, of" in card
    assert "lower/loss" not in model_card.of_run(tmp_path, base, run.summary, step=1)
