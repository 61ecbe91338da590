# SPDX-License-Identifier: Apache-2.0
"""Files from elsewhere on a base, in the commands: drawn with, attacked, exported."""

import json

import numpy as np
import pytest
import safetensors.numpy
from command_runs import NO_SAMPLES, TEXT_FILE, changed, recorded, tensors
from test_convert import same_files
from test_generate import run as generate

from gift_jax import convert
from gift_jax.models.load import load_model
from gift_jax.runtime.errors import UserError

ATTN = "down_blocks.0.attentions.0.transformer_blocks.0.attn"
ERASED, UPDATED, ATTACKED = (
    f"{ATTN}{name}.weight" for name in ("2.to_v", "1.to_q", "2.to_k")
)
TABLE = "text_model.embeddings.token_embedding.weight"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """{field: (file, its tensors)}: one tensor of the UNet, one of LoRA, three rows."""
    rng, folder = np.random.default_rng(5), tmp_path_factory.mktemp("files")

    def write(name, **arrays):
        arrays = {
            key: rng.normal(size=s).astype(np.float32) for key, s in arrays.items()
        }
        safetensors.numpy.save_file(arrays, folder / name)
        return folder / name, arrays

    half = f"unet.{UPDATED.removesuffix('.weight')}.lora"
    halves = {f"{half}.down.weight": (2, 32), f"{half}.up.weight": (32, 2)}
    return {
        "unet_tensors": write("erased.safetensors", **{ERASED: (32, 32)}),
        "lora": write("style.safetensors", **halves),
        "textual_inversion": write("word.safetensors", **{"<word>": (3, 32)}),
    }


def flags(files, start="--config.adapters."):
    return [f"{start}{name}={file}" for name, (file, _) in files.items()]


@pytest.fixture(scope="module")
def attacked(files, run_attack, tmp_path_factory):
    """LoRA of one projection, on a base with all three files."""
    workdir = tmp_path_factory.mktemp("attacked") / "run"
    more = ["--config.lora.targets=to_k", "--config.optimizer.lr=0.05", NO_SAMPLES]
    return run_attack(workdir, *flags(files), *more, prompt="a <word> thing")


def test_export_has_the_files_and_the_attack(attacked, files, tiny_folder):
    export = attacked / "export"
    updates, base = changed(tiny_folder, export), tensors(tiny_folder)
    by_attack = {n for n in base if ".attn" in n and n.endswith("to_k.weight")}
    assert set(updates) == by_attack | {ERASED, UPDATED}
    new = tensors(export)
    np.testing.assert_array_equal(new[ERASED], files["unet_tensors"][1][ERASED])
    down, up = files["lora"][1].values()
    np.testing.assert_allclose(new[UPDATED], base[UPDATED] + up @ down, atol=1e-5)
    rows = tensors(export, TEXT_FILE)[TABLE][-3:]
    np.testing.assert_array_equal(rows, files["textual_inversion"][1]["<word>"])
    model = load_model(str(export))
    assert (model.tokenize(["<word>"])[0] >= len(model.tokenizer) - 3).sum() == 3


def test_model_card_names_the_files(attacked, files):
    card = (attacked / "export" / "README.md").read_text()
    assert "the UNet tensors `erased.safetensors` (sha256 `" in card
    assert "the LoRA `style.safetensors`, scale 1 (sha256 `" in card
    assert "the textual inversion `word.safetensors`, token <word> (sha256 `" in card
    assert str(files["lora"][0].parent) not in card


def test_checkpoint_becomes_the_export(attacked, files, tmp_path):
    checkpoints = f"--checkpoint={attacked / 'checkpoints'}"
    convert.main(["to-diffusers", checkpoints, f"--out={tmp_path / 'out'}"])
    same_files(attacked / "export", tmp_path / "out")


def test_another_content_is_another_run(attacked, files, run_attack):
    file, arrays = files["unet_tensors"]
    kept = file.read_bytes()
    try:
        safetensors.numpy.save_file({n: a + 1 for n, a in arrays.items()}, file)
        with pytest.raises(UserError, match="base_sha256 was .*, is "):
            run_attack(
                attacked,
                *flags(files),
                "--config.lora.targets=to_k",
                "--config.optimizer.lr=0.05",
                NO_SAMPLES,
                prompt="a <word> thing",
            )
    finally:
        file.write_bytes(kept)


def test_train_immunizes_a_base_with_a_file(files, run_train, tiny_folder, tmp_path):
    file, arrays = files["lora"]
    run = run_train(
        tmp_path / "run",
        f"--config.adapters.lora={file}:0.5",
        "--config.steps=0",
        NO_SAMPLES,
    )
    down, up = arrays.values()
    update = changed(tiny_folder, run / "export")[UPDATED]
    np.testing.assert_allclose(update, 0.5 * up @ down, atol=1e-5)
    assert recorded(run)["adapters"]["lora"] == [f"{file}:0.5"]


def test_generate_draws_with_the_files(files, attacked, tiny_folder, tmp_path):
    how = {"prompts": ["a <word>"]}
    few = ("--num=1", "--no-grid")
    plain = generate(tiny_folder, tmp_path / "plain", *few, **how)
    start = [flag.replace("_", "-", 1) for flag in flags(files, "--")]
    added = generate(tiny_folder, tmp_path / "added", *few, *start, **how)
    assert np.abs(added["000-000.png"].astype(int) - plain["000-000.png"]).mean() > 1
    settings = json.loads((tmp_path / "added" / "generate.json").read_text())
    assert settings["lora"] == [str(files["lora"][0])]
    before = json.loads((tmp_path / "plain" / "generate.json").read_text())
    assert settings["model_sha256"] != before["model_sha256"]


def test_file_that_does_not_fit_is_named_before_anything_is_written(
    files, run_attack, tiny_folder, tmp_path
):
    file = files["unet_tensors"][0]
    with pytest.raises(
        UserError, match="erased.*is no tensor of a LoRA by the names of"
    ):
        run_attack(tmp_path / "run", f"--config.adapters.lora={file}", NO_SAMPLES)
    with pytest.raises(UserError, match="erased.*to_v.weight is no token"):
        generate(tiny_folder, tmp_path / "run", f"--textual-inversion={file}")
    assert not (tmp_path / "run").exists()
