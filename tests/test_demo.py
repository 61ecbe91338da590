# SPDX-License-Identifier: Apache-2.0
"""The demo's errors; its whole run is `make demo`."""

import argparse
import json

import numpy as np
import pytest

from gift_jax import demo
from gift_jax.data.sources import emoji
from gift_jax.runtime.errors import UserError


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--harmful", "bomp"], "did you mean 'bomb'"),
        (["--safe", "unheard of"], "--safe='unheard of' is not one of"),
        (["--num", "0"], "--num=0 must be at least 1"),
        (["--nun", "3"], "unrecognized arguments: --nun 3"),
    ],
)
def test_demo_names_a_mistake(flags, message):
    with pytest.raises(UserError, match=message):
        demo.main(flags)


def test_demo_results_hold_every_cell():
    images = np.zeros((1, 8, 8, 3), np.uint8)
    cells = [
        demo.Cell(side, thing, model, images, score)
        for side, thing, score in (("harmful", "bomb", 0.5), ("safe", "guitar", 0.25))
        for model in demo.MODELS
    ]
    assert demo.recognized(cells) == {
        "harmful": dict.fromkeys(demo.MODELS, 0.5),
        "safe": dict.fromkeys(demo.MODELS, 0.25),
    }


def test_demo_takes_each_part_once(tmp_path, monkeypatch):
    """Stopped in its attacks, it goes on with the first that is not done."""
    monkeypatch.setattr(demo.judges, "load", Judge)
    monkeypatch.setattr(demo, "load_model", lambda folder: folder)
    monkeypatch.setattr(demo, "draw_to_folder", draw)
    calls = []

    def immunize(cfg, folder):
        calls.append("immunize")
        return folder / "export"

    def attack(cfg, folder, *, share, at_steps, look):
        if len(calls) == 3 and not stopped:
            stopped.append(True)
            raise KeyboardInterrupt
        calls.append(folder.name)
        look(*at_steps, f"attacked {cfg.model}")

    stopped = []
    monkeypatch.setattr(demo.train, "run", immunize)
    monkeypatch.setattr(demo.attack, "train", attack)
    args = argparse.Namespace(
        workdir=str(tmp_path),
        harmful="bomb",
        safe="guitar",
        num=2,
        attack_steps=0,
        variant="",
    )
    with pytest.raises(KeyboardInterrupt):
        demo.Demo(args).run()
    assert (tmp_path / "original.png").exists()
    results = json.loads(demo.Demo(args).run().read_text())
    attacks = [name for name in calls if name != "immunize"]
    assert len(attacks) == len(set(attacks)) == 8
    assert calls.count("immunize") == 2  # a finished run of `train` does nothing again
    for side in demo.SIDES:
        assert results["recognized"][side].keys() == set(demo.MODELS)
    assert len(results["seconds"]) == 11


class Judge:
    """Recognizes the first of two images."""

    concepts, version = emoji.all_concepts(), "none"

    def name(self, images):
        return np.array([self.concepts.index("bomb"), -1]), None


def draw(model, prompts, samples, folder):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(len(prompts)):
        (folder / f"{i}.png").touch()
    return np.zeros((len(prompts), 8, 8, 3), np.uint8)
