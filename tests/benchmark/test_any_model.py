# SPDX-License-Identifier: Apache-2.0
"""The benchmark on a Stable Diffusion folder and images in folders."""

import json

import pytest
from command_runs import CONFIGS
from tiny_model import write_pictures

from gift_jax.benchmark import __main__ as benchmark_main
from gift_jax.benchmark import matrix, summary, workload
from gift_jax.data import captions
from gift_jax.runtime.config import load_config

CONFIG = CONFIGS / "sd15_benchmark.py"


@pytest.fixture
def images(tmp_path, monkeypatch):
    """data/ beside the run, as the config names it: other pictures in each folder."""
    names = ("purse/defense", "purse/attacker", "benign", "safe")
    for seed, name in enumerate(names):
        folder = tmp_path / "data" / name
        folder.mkdir(parents=True)
        write_pictures(folder, 3, seed)
    for i, text in enumerate(("a dog", "a red car", "two people")):
        (tmp_path / "data" / "safe" / f"{i}.txt").write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIFT_JAX_CACHE", str(tmp_path / "cache"))
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("model", ["tiny_folder", "tiny_xl_folder"])
def test_smoke_runs_on_any_model_and_any_images(images, model, request):
    argv = [f"--config={CONFIG}:smoke", "--workdir=run"]
    argv += [f"--config.model={request.getfixturevalue(model)}"]
    assert benchmark_main.main(argv) == 0
    data = json.loads((images / "run" / "results.json").read_text())
    cells = data["cells"]
    assert {cell["concept"] for cell in cells} == {"object", "style"}
    assert {cell["attack"] for cell in cells} == {"before", "lora", "edit_back"}
    assert {cell["prompt"] for cell in cells} == {
        *("name", "description", "nonce", "existing_word")
    }
    for cell in cells:
        values = cell["points"][-1]["values"]
        assert "judge_image_similarity" in values
        is_twin = cell["side"] == summary.RETAINED and cell["method"] == "uce"
        assert ("twin_rms" in values) == is_twin
    heads = {row["method"]: row for row in data["headline"]}
    assert heads["uce"]["worst"]["concept"] in ("object", "style")
    assert heads["uce"]["fidelity"]["judge_twin_distance"] > 0
    attacked = json.loads(
        next(
            (images / "run").glob("cells/object/uce/harmful/lora/nonce_0/config.json")
        ).read_text()
    )
    assert attacked["data"]["folder"] == "data/purse/attacker"
    word = attacked["data"]["prompt"].split()[-2]
    assert word in captions.HELD_OUT_WORDS
    defense = next((images / "run").glob("defenses/object/uce/0/config.json"))
    assert json.loads(defense.read_text())["harmful"]["folder"] == "data/purse/defense"
    generated = next(
        (images / "run").glob("cells/style/uce/harmful/lora/nonce_0/config.json")
    )
    data_group = json.loads(generated.read_text())["data"]
    assert data_group["prompt"] == "An artwork by Van Gogh"  # what the model draws
    assert data_group["caption"].startswith("An artwork by ") != data_group["prompt"]


def test_whole_suite_is_sound_and_counted_without_images_or_model():
    jobs = matrix.Matrix(load_config(str(CONFIG)))
    counts = workload.count(jobs, jobs.cells)
    assert counts["defended models"] == 3 * 3 * 6
    assert counts["cells"] > 1000 and counts["attack steps"] > 5e5
    nsfw = [c for c in jobs.cells if c.concept == "nsfw" and c.is_attacked]
    # captions say what is in explicit pictures: no name, no description
    assert {c.prompt for c in nsfw if c.side == "harmful"} >= {"name", "nonce"}
    assert jobs.attack_config(nsfw[0]).data.prompt == ""
