# SPDX-License-Identifier: Apache-2.0
"""The attack command line on the tiny model: what it changes, its mistakes."""

import shutil

import jax
import numpy as np
import pytest
import safetensors.numpy
from command_runs import (
    CONFIGS,
    INVERSION,
    LORA,
    NO_SAMPLES,
    NOT_VERIFIED,
    TEXT_FILE,
    changed,
    logged,
    recorded,
    tensors,
)
from PIL import Image

from gift_jax import attack
from gift_jax.models import safetensors_io
from gift_jax.models.folder import ModelFolder
from gift_jax.models.sd import stable_diffusion
from gift_jax.models.sd.adapters import AdapterFiles, read_adapters
from gift_jax.runtime.errors import UserError
from gift_jax.sampling import sampler

TABLE = "text_model.embeddings.token_embedding.weight"
PYTORCH_LORA = "pytorch_lora_weights.safetensors"
STEPS = [f"step_{i:06d}.png" for i in (0, 1, 3)]
INVERSION_SMOKE = "emoji_attack.py:textual_inversion_smoke"


# --- LoRA -----------------------------------------------------------------------------


def test_run_fills_its_folder(lora_run):
    assert recorded(lora_run)["attack"] == "lora"
    lines = logged(lora_run)
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert {"attack/loss", "attack/grad_norm"} <= set(lines[0])
    assert (lora_run / "checkpoints" / "3").is_dir()
    with Image.open(lora_run / "samples" / "after.png") as image:
        assert image.size[0] > 16
    stable_diffusion.load(lora_run / "export")


@pytest.mark.filterwarnings("ignore")  # peft's and diffusers' own
def test_kohya_file_is_the_same_update(lora_run, tiny_folder):
    """By our reading and by diffusers', which needs no argument beside the file."""
    kohya, by_diffusers = (
        lora_run / "lora" / name for name in ("kohya.safetensors", PYTORCH_LORA)
    )
    notes = safetensors_io.read_metadata(kohya)
    assert notes["ss_network_module"] == "networks.lora"
    assert (notes["ss_network_dim"], notes["ss_network_alpha"]) == ("2", "7.0")
    arrays = safetensors.numpy.load_file(kohya)
    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_out_0"
    assert arrays[f"{name}.alpha"] == 7 and arrays[f"{name}.alpha"].shape == ()
    assert arrays[f"{name}.lora_down.weight"].shape[0] == 2
    assert len(arrays) == 3 * len(safetensors.numpy.load_file(by_diffusers)) / 2
    base = tensors(tiny_folder)
    ours, expected = (
        ModelFolder(
            tiny_folder, "", read_adapters(AdapterFiles(lora=(str(f),)), tiny_folder)
        ).adapted_params()
        for f in (kohya, by_diffusers)
    )
    assert len(expected) == 12 and ours.keys() == expected.keys()
    pytest.importorskip("peft")
    from diffusers import StableDiffusionPipeline

    theirs = StableDiffusionPipeline.from_pretrained(str(tiny_folder))
    theirs.load_lora_weights(str(kohya))
    theirs.fuse_lora()
    theirs.unload_lora_weights()
    theirs = theirs.unet.state_dict()
    for path, array in expected.items():
        name = safetensors_io.torch_name(path)
        assert np.abs(array.T - base[name]).max() > 1e-3
        np.testing.assert_allclose(ours[path], array, atol=1e-6)
        np.testing.assert_allclose(theirs[name], array.T, atol=1e-6)


def test_export_adds_an_update_of_the_rank_to_the_targets_only(lora_run, tiny_folder):
    """Also in half precision, as which the run computed."""
    updates = changed(tiny_folder, lora_run / "export")
    targets = {
        name
        for name in tensors(tiny_folder)
        if name.endswith((".to_k.weight", ".to_out.0.weight")) and ".attn" in name
    }
    assert set(updates) == targets
    for name, update in updates.items():
        values = np.linalg.svd(update, compute_uv=False)
        assert values[1] > 0 and values[2] < 1e-3 * values[0], name


def test_resumed_attack_is_a_straight_one_and_draws_each_sample_once(
    lora_run, run_attack, tmp_path, monkeypatch
):
    def samples(run):
        return [(run / "samples" / name).read_bytes() for name in STEPS]

    assert len(set(samples(lora_run))) == 3
    assert (lora_run / "samples" / "after.png").read_bytes() == samples(lora_run)[2]
    names, save = [], attack.save_image_grid

    def save_image_grid(*args):
        names.append(args[-1].name)
        save(*args)

    monkeypatch.setattr(attack, "save_image_grid", save_image_grid)
    halfway = run_attack(tmp_path / "run", *LORA, "--config.steps=1")
    assert changed(lora_run / "export", halfway / "export")
    resumed = run_attack(tmp_path / "run", *LORA)
    assert names == [*STEPS[:2], "after.png", STEPS[2], "after.png"]
    assert not changed(lora_run / "export", resumed / "export")
    assert samples(resumed) == samples(lora_run)


@pytest.mark.parametrize("which", ["lora_run", "inversion_run"])
def test_pytorch_reads_what_a_run_writes(
    request, run_attack, tmp_path, log_lines, which
):
    """Of a finished run that is called again: its export, and its files on the base."""
    pytest.importorskip("peft")
    pytest.importorskip("diffusers")
    run = shutil.copytree(request.getfixturevalue(which), tmp_path / "run")
    if which == "lora_run":
        run_attack(run, *LORA, "--config.verify=on")
    else:
        config = "emoji_attack.py:textual_inversion_smoke"
        flags = *INVERSION, "--config.verify=on"
        run_attack(run, *flags, config=config, prompt="a <thing>")
    of_export, of_files = (line for line in log_lines if "verified: 3 comp" in line)
    assert "pictures differ by at most" in of_export
    added = " and 12 + 12 LoRA layers"
    added = added if which == "lora_run" else " and 2 vectors of <thing>"
    assert f"components{added} load in" in of_files


# --- DreamBooth -----------------------------------------------------------------------


@pytest.mark.slow
def test_dreambooth_trains_the_text_encoder_too(dreambooth_run, tiny_folder):
    export = dreambooth_run / "export"
    assert set(changed(tiny_folder, export)) == set(tensors(tiny_folder))
    updates = changed(tiny_folder, export, TEXT_FILE)
    assert set(updates) == set(tensors(tiny_folder, TEXT_FILE))
    # the prompt's words move by Adam's rate, those of no prompt by the weight decay
    moved = np.abs(updates[TABLE]).max(axis=1)
    assert moved.max() > 20 * np.median(moved)


def test_dreambooth_changes_the_whole_unet_and_nothing_else_and_adds_the_prior(
    tiny_folder, tmp_path, monkeypatch
):
    """As configs/sd15_attack.py has it, on images that the model draws."""
    monkeypatch.setenv("GIFT_JAX_CACHE", str(tmp_path / "cache"))
    argv = [f"--config={CONFIGS / 'sd15_attack.py'}:dreambooth_prior_smoke"]
    argv += [f"--config.model={tiny_folder}", f"--workdir={tmp_path / 'run'}"]
    argv += ["--config.data.batch=2", "--config.prior.batch=2"]  # two devices
    assert attack.main([*argv, NO_SAMPLES, NOT_VERIFIED]) == 0
    line = logged(tmp_path / "run")[0]
    parts = line["attack/instance_loss"], line["attack/prior_loss"]
    assert abs(parts[0] - parts[1]) > 1e-3
    assert line["attack/loss"] == pytest.approx(sum(parts))
    export = tmp_path / "run" / "export"
    assert set(changed(tiny_folder, export)) == set(tensors(tiny_folder))
    assert not changed(tiny_folder, export, TEXT_FILE)


# --- textual inversion ----------------------------------------------------------------


def test_textual_inversion_adds_rows_and_leaves_every_other_byte(
    inversion_run, tiny_folder
):
    export = inversion_run / "export"
    assert not changed(tiny_folder, export)
    old, new = tensors(tiny_folder, TEXT_FILE), tensors(export, TEXT_FILE)
    before, after = old.pop(TABLE), new.pop(TABLE)
    assert after.shape == (len(before) + 2, before.shape[1])
    np.testing.assert_array_equal(after[: len(before)], before)
    for name in old:
        np.testing.assert_array_equal(old[name], new[name])
    learned = safetensors.numpy.load_file(inversion_run / "learned_embeds.safetensors")
    assert list(learned) == ["<thing>"]
    np.testing.assert_array_equal(learned["<thing>"], after[len(before) :])
    # which transformers 4 reads; 5 reads tokenizer.json
    read = {file.name for file in (export / "tokenizer").iterdir()}
    assert {"vocab.json", "merges.txt", "added_tokens.json"} <= read
    model = stable_diffusion.load(export)
    word = model.tokenizer("a", add_special_tokens=False).input_ids[0]
    assert np.abs(learned["<thing>"] - before[word]).min(axis=1).max() > 0.1  # trained


# --- what PyTorch draws with what we wrote --------------------------------------------

PROMPTS = ["a <thing>", "a sks thing"]


def ours_draw(folder, latents):
    model = stable_diffusion.load(folder)
    cond = model.encode_text(PROMPTS)
    uncond = model.encode_text([""])
    outputs = []
    for decode in (False, True):
        sample = sampler.make_sampler(model, "ddim", 4, 4.0, decode)
        args = model.params["unet"], model.params["vae"], cond, uncond, latents
        outputs.append(np.asarray(sample(*args)))
    return outputs[0], outputs[1].astype(int)


def torch_draws(folder, latents, add=None):
    """(latents, images) of PyTorch's pipeline; add: puts the attack into it."""
    import torch
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(str(folder))
    pipeline.set_progress_bar_config(disable=True)
    if add:
        add(pipeline)
    how = {"num_inference_steps": 4, "guidance_scale": 4.0}
    z = torch.tensor(np.asarray(latents))
    ends = pipeline(PROMPTS, latents=z, output_type="latent", **how).images
    images = pipeline(PROMPTS, latents=z, output_type="pil", **how).images
    return ends.numpy(), np.stack([np.asarray(image) for image in images]).astype(int)


def assert_drawn_alike(base, run, add):
    """PyTorch with the base and the added file, and ours with the export, agree."""
    shape = stable_diffusion.load(base).latent_shape
    latents = sampler.initial_latents(jax.random.key(3), 2, shape)
    before, images_before = ours_draw(base, latents)
    ours, images = ours_draw(run / "export", latents)
    assert np.abs(ours - before).max() / np.abs(before).max() > 1e-2
    assert np.abs(images - images_before).mean() > 1
    for folder, put in ((run / "export", None), (base, add)):
        theirs, their_images = torch_draws(folder, latents, put)
        assert np.abs(ours - theirs).max() / np.abs(theirs).max() < 1e-4
        assert np.abs(images - their_images).mean() <= 1  # of 255


@pytest.mark.filterwarnings("ignore")  # peft's and diffusers' own
def test_pytorch_with_the_lora_file_draws_what_we_draw(lora_run, tiny_folder):
    pytest.importorskip("peft")

    def add(pipeline):  # the name is the default, unless offline
        pipeline.load_lora_weights(lora_run / "lora", weight_name=PYTORCH_LORA)

    assert_drawn_alike(tiny_folder, lora_run, add)


@pytest.mark.filterwarnings("ignore")
def test_pytorch_with_the_learned_embedding_draws_what_we_draw(
    inversion_run, tiny_folder
):
    pytest.importorskip("torch")
    file = str(inversion_run / "learned_embeds.safetensors")
    assert_drawn_alike(
        tiny_folder, inversion_run, lambda pipe: pipe.load_textual_inversion(file)
    )


# --- mistakes -------------------------------------------------------------------------


def mistake(run_attack, tmp_path, *flags, match, **kwargs):
    with pytest.raises(UserError, match=match) as caught:
        run_attack(tmp_path / "run", *flags, **kwargs)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()  # or a corrected run could not use it


@pytest.mark.parametrize(
    "flag, message",
    [
        ("attack=lorra", "config.attack='lorra' is not one of.*lora"),
        ("attack=dreambooth", "config.dreambooth is missing: this config is of anoth"),
        ("lora.targets=()", "config.lora.targets is empty"),
        ("lora.rnk=2", "config.lora.rnk is no field.*did you mean config.lora.rank"),
        ("data.batch=5", "data.batch=5 must divide by 2 devices.*batch=4"),
        ("data.folder=nowhere", "config.data.folder=nowhere is not a folder"),
        ("samples.steps=1001", "config.samples.steps=1001 must be at most 1000"),
        ("samples.at_steps=1,x", "config.samples.at_steps='x' must be whole numbers"),
        ("samples.at_steps=-1", "config.samples.at_steps='-1' must be whole numbers"),
        ("model=nowhere", "nowhere.*no such folder"),
    ],
)
def test_mistake_is_named_before_anything_is_written(
    run_attack, tmp_path, flag, message
):
    flags = "--config.hardware.cpu_devices=2", f"--config.{flag}"
    mistake(run_attack, tmp_path, *flags, match=message)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["prior.num_generated=0"], "config.prior: give one of names, folder"),
        (["prior.batch=3"], "prior.batch=3 must divide by 2 devices"),
    ],
)
def test_mistake_of_the_prior_counts_where_it_is_read(
    tmp_path, tiny_folder, flags, message
):
    argv = [f"--config={CONFIGS / 'sd15_attack.py'}:dreambooth_smoke"]
    argv += [f"--config.model={tiny_folder}", f"--workdir={tmp_path / 'run'}"]
    argv += ["--config.hardware.cpu_devices=2", "--config.data.batch=2"]
    argv += ["--config.dreambooth.prior_weight=1", *(f"--config.{f}" for f in flags)]
    with pytest.raises(UserError, match=message):
        attack.main(argv)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "flag, message",
    [
        ("textual_inversion.token=a b", "token='a b' must be one word"),
        ("textual_inversion.token=<x>", "'a <thing>' has no <x>"),
        ("data.prompt=a sks thing", "'a sks thing' has no <thing>"),
        (
            "textual_inversion.initializer=abc",
            "initializer='abc' is 3 tokens .a b c</w>. .* or 2, one",
        ),
        (
            "textual_inversion.token=a</w>",
            "'a</w>' is in the model's vocabulary already",
        ),
    ],
)
def test_word_that_cannot_be_learned_is_named(run_attack, tmp_path, flag, message):
    flags = (*INVERSION, "--config.data.prompt=a <thing>", f"--config.{flag}")
    mistake(run_attack, tmp_path, *flags, match=message, config=INVERSION_SMOKE)


def test_captions_without_the_token_are_named(run_attack, tmp_path, image_folder):
    folder = tmp_path / "captioned"
    folder.mkdir()
    for i in range(2):
        shutil.copy(image_folder / f"{i}.png", folder)
    table = "file_name,text\n0.png,a <thing>\n1.png,a dog\n"
    (folder / "metadata.csv").write_text(table)
    flags = [*INVERSION, "--config.data.prompt=", f"--config.data.folder={folder}"]
    message = "config.data: 'a dog' has no <thing>"
    mistake(run_attack, tmp_path, *flags, match=message, config=INVERSION_SMOKE)
