# SPDX-License-Identifier: Apache-2.0
"""The attack command line on the tiny model: what it changes, its mistakes."""

import json
import pathlib

import jax
import numpy as np
import pytest
import safetensors.numpy
from PIL import Image
from tiny_model import write_pictures

import gift_jax
from gift_jax import attack
from gift_jax.models import weights
from gift_jax.models.sd import stable_diffusion
from gift_jax.runtime.errors import UserError
from gift_jax.sampling import images, sampler
from gift_jax.sampling.images import save_image_grid

CONFIG = pathlib.Path(gift_jax.__file__).parents[1] / "configs" / "emoji_attack.py"
TEXT_FILE = pathlib.Path("text_encoder/model.safetensors")
QUIET = "--config.samples.num=0"
DREAMBOOTH = "--config.attack=dreambooth"
INVERSION = (
    "--config.attack=textual_inversion",
    "--config.inversion.initializer=a",
    "--config.data.prompt=a <thing>",
    "--config.optimizer.lr=0.5",
)
TOGETHER = (DREAMBOOTH, "--config.dreambooth.train_text_encoder=true")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder of two pictures of the tiny model's size."""
    return write_pictures(tmp_path_factory.mktemp("pictures"), 2, 4)


@pytest.fixture(scope="module")
def main(tiny_folder, pictures):
    """(workdir, flags) -> the run's folder, on the pictures and the tiny model."""

    def call(workdir, *flags, names=False, variant="smoke"):
        argv = [f"--config={CONFIG}:{variant}", f"--workdir={workdir}"]
        argv += [f"--config.model={tiny_folder}"]
        if not names:
            argv += ["--config.data.names=()", f"--config.data.folder={pictures}"]
            argv += ["--config.data.prompt=a sks thing"]
        assert attack.main([*argv, *flags]) == 0
        return workdir

    return call


def unet_tensors(folder):
    return safetensors.numpy.load_file(
        folder / "unet" / "diffusion_pytorch_model.safetensors"
    )


def changes(base, folder):
    """Name -> difference of the tensors whose bytes changed."""
    old, new = unet_tensors(base), unet_tensors(folder)
    assert set(old) == set(new)
    return {
        name: new[name] - old[name]
        for name in old
        if old[name].tobytes() != new[name].tobytes()
    }


def sd15_run(variant, tiny_folder, tmp_path, *flags):
    """The folder of a smoke run of configs/sd15_attack.py on the tiny model."""
    argv = [f"--config={CONFIG.with_name('sd15_attack.py')}:{variant}", QUIET]
    argv += [f"--config.model={tiny_folder}", "--config.data.batch=2"]  # two devices
    argv += ["--config.prior.batch=2", f"--workdir={tmp_path / 'run'}"]
    assert attack.main([*argv, *flags]) == 0
    return tmp_path / "run"


@pytest.mark.parametrize("variant", ["smoke", "textual_inversion_smoke"])
def test_sd15_config_attacks_with_what_the_model_draws(
    tiny_folder, tmp_path, monkeypatch, pytestconfig, variant
):
    monkeypatch.setenv("GIFT_JAX_CACHE", str(pytestconfig.cache.mkdir("emoji")))
    run = sd15_run(variant, tiny_folder, tmp_path)
    base, export = (weights.content_hash(f) for f in (tiny_folder, run / "export"))
    assert base != export


def test_smoke_config_attacks_and_fills_the_runs_folder(
    main, tiny_folder, tmp_path, monkeypatch, pytestconfig
):
    monkeypatch.setenv("GIFT_JAX_CACHE", str(pytestconfig.cache.mkdir("emoji")))
    run = main(tmp_path / "run", names=True)
    assert json.loads((run / "config.json").read_text())["attack"] == "lora"
    lines = (run / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]
    assert {"attack/loss", "attack/grad_norm"} <= set(json.loads(lines[0]))
    assert (run / "checkpoints" / "2").is_dir()
    with Image.open(run / "samples" / "after.png") as image:
        assert image.size[0] > 16
    stable_diffusion.load(run / "export")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_export_adds_an_update_of_the_rank_to_the_targets_only(
    main, tiny_folder, tmp_path, dtype
):
    run = main(
        tmp_path / "run",
        f"--config.compute_dtype={dtype}",
        "--config.lora.rank=2",
        "--config.lora.targets=to_k,to_out_0",
        "--config.samples.num=0",
    )
    changed = changes(tiny_folder, run / "export")
    wanted = {
        name
        for name in unet_tensors(tiny_folder)
        if name.endswith((".to_k.weight", ".to_out.0.weight")) and ".attn" in name
    }
    assert set(changed) == wanted
    for name, delta in changed.items():
        values = np.linalg.svd(delta, compute_uv=False)
        assert values[2] < 1e-3 * values[0], name


def test_resumed_attack_is_a_straight_one_and_draws_each_sample_once(
    main, tmp_path, monkeypatch
):
    drawn, save = [], save_image_grid

    def save_grid(*args):
        drawn.append(args[-1].name)
        save(*args)

    monkeypatch.setattr(images, "save_image_grid", save_grid)
    flags = ["--config.samples.at=0,1,3", "--config.lora.alpha=800"]
    flags += ["--config.samples.prompts=a dog", "--config.steps=3"]
    straight = main(tmp_path / "a", *flags)
    steps = [f"step_{i:06d}.png" for i in (0, 1, 3)]
    assert drawn == [*steps, "after.png"]
    pictures = [(straight / "samples" / name).read_bytes() for name in drawn]
    assert len(set(pictures[:3])) == 3
    assert pictures[3] == pictures[2]
    drawn.clear()
    halfway = main(tmp_path / "b", *flags, "--config.steps=1")
    assert changes(straight / "export", halfway / "export")
    resumed = main(tmp_path / "b", *flags)
    assert drawn == [*steps[:2], "after.png", steps[2], "after.png"]
    assert not changes(straight / "export", resumed / "export")
    again = [(resumed / "samples" / name).read_bytes() for name in steps]
    assert again == pictures[:3]


# --- DreamBooth -----------------------------------------------------------------------


def text_tensors(folder):
    return safetensors.numpy.load_file(folder / TEXT_FILE)


@pytest.fixture(scope="module")
def together(main, tmp_path_factory):
    """A run that trained the UNet and the text encoder."""
    folder = tmp_path_factory.mktemp("together") / "run"
    return main(folder, *TOGETHER, QUIET, variant="dreambooth_smoke")


def test_dreambooth_trains_the_text_encoder_too(together, tiny_folder):
    run = together
    assert changes(tiny_folder, run / "export")
    old, new = text_tensors(tiny_folder), text_tensors(run / "export")
    assert set(old) == set(new)
    same = [name for name in old if np.array_equal(old[name], new[name])]
    assert not same
    # the prompt's words move by Adam's rate, those of no prompt by the weight decay
    table = "text_model.embeddings.token_embedding.weight"
    moved = np.abs(new[table] - old[table]).max(axis=1)
    assert moved.max() > 20 * np.median(moved)


def test_dreambooth_changes_the_whole_unet_and_nothing_else_and_adds_the_prior(
    tiny_folder, tmp_path, monkeypatch, pytestconfig
):
    monkeypatch.setenv("GIFT_JAX_CACHE", str(pytestconfig.cache.mkdir("emoji")))
    run = sd15_run(
        "dreambooth_prior_smoke",
        tiny_folder,
        tmp_path,
        "--config.compute_dtype=bfloat16",
    )
    line = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    parts = line["attack/instance_loss"], line["attack/prior_loss"]
    assert abs(parts[0] - parts[1]) > 1e-3
    assert line["attack/loss"] == pytest.approx(sum(parts))
    assert set(changes(tiny_folder, run / "export")) == set(unet_tensors(tiny_folder))
    texts = [(f / TEXT_FILE).read_bytes() for f in (tiny_folder, run / "export")]
    assert texts[0] == texts[1]


# --- textual inversion ----------------------------------------------------------------


@pytest.fixture(scope="module")
def inverted(main, tmp_path_factory):
    """Number of vectors -> a run that learned them."""
    folder, runs = tmp_path_factory.mktemp("inverted"), {}
    for count in (1, 2):
        flags = *INVERSION, QUIET, f"--config.inversion.vectors={count}"
        runs[count] = main(
            folder / str(count), *flags, variant="textual_inversion_smoke"
        )
    return runs


def test_textual_inversion_adds_rows_and_leaves_every_other_byte(inverted, tiny_folder):
    run = inverted[2]
    assert not changes(tiny_folder, run / "export")
    old, new = text_tensors(tiny_folder), text_tensors(run / "export")
    table = "text_model.embeddings.token_embedding.weight"
    before, after = old.pop(table), new.pop(table)
    assert after.shape == (len(before) + 2, before.shape[1])
    np.testing.assert_array_equal(after[: len(before)], before)
    for name in old:
        np.testing.assert_array_equal(old[name], new[name])
    learned = safetensors.numpy.load_file(run / "learned_embeds.safetensors")
    assert list(learned) == ["<thing>"]
    np.testing.assert_array_equal(learned["<thing>"], after[len(before) :])
    model = stable_diffusion.load(run / "export")
    word = model.tokenizer("a", add_special_tokens=False).input_ids[0]
    assert np.abs(learned["<thing>"] - before[word]).min(axis=1).max() > 0.1  # trained


# --- what PyTorch draws with what we wrote --------------------------------------------

PROMPTS = ["a <thing>", "a sks thing"]


def ours_draw(folder, latents):
    model = stable_diffusion.load(folder)
    cond = stable_diffusion.encode_prompts(model, PROMPTS)
    uncond = stable_diffusion.encode_prompts(model, [""])
    made = []
    for decode in (False, True):
        sample = sampler.make_sampler(model, "ddim", 4, 4.0, decode)
        args = model.params["unet"], model.params["vae"], cond, uncond, latents
        made.append(np.asarray(sample(*args)))
    return made[0], made[1].astype(int)


def torch_draws(folder, latents, added=None):
    """(latents, pictures) of PyTorch's pipeline; added: puts the attack into it."""
    import torch
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(str(folder))
    pipeline.set_progress_bar_config(disable=True)
    if added:
        added(pipeline)
    how = {"num_inference_steps": 4, "guidance_scale": 4.0}
    z = torch.tensor(np.asarray(latents))
    ends = pipeline(PROMPTS, latents=z, output_type="latent", **how).images
    pictures = pipeline(PROMPTS, latents=z, output_type="pil", **how).images
    return ends.numpy(), np.stack([np.asarray(p) for p in pictures]).astype(int)


def assert_drawn_alike(base, run, added):
    """PyTorch with the base and the added file, and ours with the export, agree."""
    tiny = stable_diffusion.load(base)
    latents = sampler.initial_latents(jax.random.key(3), 2, tiny.latent_shape)
    before, before_pictures = ours_draw(base, latents)
    ours, pictures = ours_draw(run / "export", latents)
    assert np.abs(ours - before).max() / np.abs(before).max() > 1e-2
    assert np.abs(pictures - before_pictures).mean() > 1
    for folder, put in ((run / "export", None), (base, added)):
        theirs, their_pictures = torch_draws(folder, latents, put)
        assert np.abs(ours - theirs).max() / np.abs(theirs).max() < 1e-4
        assert np.abs(pictures - their_pictures).mean() <= 1  # of 255


@pytest.mark.filterwarnings("ignore")  # peft's and diffusers' own
def test_pytorch_with_the_lora_file_draws_what_we_draw(main, tiny_folder, tmp_path):
    pytest.importorskip("peft")
    flags = ["--config.lora.rank=2", "--config.lora.alpha=7", QUIET]
    run = main(tmp_path / "run", *flags, "--config.optimizer.lr=0.05")
    name = "pytorch_lora_weights.safetensors"  # the default, unless offline

    def added(pipeline):
        pipeline.load_lora_weights(run / "lora", weight_name=name)

    assert_drawn_alike(tiny_folder, run, added)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("vectors", [1, 2])
def test_pytorch_with_the_learned_embedding_draws_what_we_draw(
    inverted, tiny_folder, vectors
):
    pytest.importorskip("torch")
    run = inverted[vectors]
    file = str(run / "learned_embeds.safetensors")
    assert_drawn_alike(
        tiny_folder, run, lambda pipeline: pipeline.load_textual_inversion(file)
    )


# --- every attack ---------------------------------------------------------------------


@pytest.mark.parametrize("which", ["together", "inverted"])
def test_resumed_run_is_a_straight_one(request, main, tmp_path, which):
    straight = request.getfixturevalue(which)
    flags, variant = (*TOGETHER, QUIET), "dreambooth_smoke"
    if which == "inverted":
        straight = straight[1]
        flags = *INVERSION, QUIET, "--config.inversion.vectors=1"
        variant = "textual_inversion_smoke"
    halfway = main(tmp_path / "run", *flags, "--config.steps=1", variant=variant)
    before = weights.content_hash(halfway / "export")
    resumed = main(tmp_path / "run", *flags, variant=variant)
    hashes = [weights.content_hash(run / "export") for run in (straight, resumed)]
    assert hashes[0] == hashes[1] != before


def test_another_seed_learns_otherwise(main, inverted, tmp_path):
    flags = *INVERSION, QUIET, "--config.inversion.vectors=1", "--config.seed=7"
    other = main(tmp_path / "run", *flags, variant="textual_inversion_smoke")
    files = [run / "learned_embeds.safetensors" for run in (inverted[1], other)]
    ours, theirs = (safetensors.numpy.load_file(f)["<thing>"] for f in files)
    assert not np.array_equal(ours, theirs)


@pytest.mark.parametrize(
    "flag, message",
    [
        ("attack=lorra", "config.attack='lorra' is not one of.*lora"),
        ("lora.rank=0", "config.lora.rank=0 must be at least 1"),
        (
            "lora.alpha=0",
            "config.lora.alpha=0.0 must be above 0; try config.lora.alpha=8",
        ),
        ("lora.alpha=nan", "config.lora.alpha=nan must be finite"),
        ("lora.targets=to_q,to_x", "config.lora.targets.*'to_x'; choose from to_q"),
        ("lora.targets=()", "config.lora.targets"),
        ("lora.targets=proj_in", "config.lora.targets.*'proj_in'"),
        ("lora.rnk=2", "config.lora.rnk is no field.*did you mean config.lora.rank"),
        ("optimizer.schedule=step", "config.optimizer.schedule='step' is not one of"),
        ("optimizer.lr=-1", "config.optimizer.lr=-1.0 must be at least 0"),
        ("steps=-5", "config.steps=-5 must be at least 0"),
        ("data.batch=5", "data.batch=5 must divide by 2 devices.*batch=4"),
        (
            "data.augmented_copies=0",
            "config.data.augmented_copies=0 must be at least 1",
        ),
        ("data.folder=nowhere", "config.data.folder=nowhere is not a folder"),
        ("samples.steps=1001", "config.samples.steps=1001 must be at most 1000"),
        ("model=nowhere", "nowhere.*no such folder"),
        ("samples.at=1,x", "config.samples.at=x must be whole numbers"),
        ("samples.at=-1", "config.samples.at=-1 must be whole numbers"),
    ],
)
def test_mistake_is_named_before_anything_is_written(main, tmp_path, flag, message):
    with pytest.raises(UserError, match=message) as caught:
        main(tmp_path / "run", "--config.cpu_devices=2", f"--config.{flag}")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()  # or a corrected run could not use it


@pytest.mark.parametrize(
    "flags, message",
    [
        (
            ["attack=dreambooth", "dreambooth.prior_weight=-1"],
            "config.dreambooth.prior_weight=-1.0 must be at least 0",
        ),
        (
            ["attack=dreambooth", "dreambooth.prior_weight=1", "prior.num_generated=0"],
            "config.prior: give one of names, folder",
        ),
        (
            [
                "attack=dreambooth",
                "dreambooth.prior_weight=1",
                "prior.batch=3",
                "cpu_devices=2",
            ],
            "prior.batch=3 must divide by 2 devices",
        ),
        (["attack=textual_inversion"], "data.prompt='a sks thing' has no <thing>"),
        (["inversion.token=a b"], "token='a b' must be one word"),
        (["inversion.token=sks"], "data.prompt='a <thing>' has no sks"),
        (["inversion.vectors=0"], "config.inversion.vectors=0 must be at least 1"),
        (["inversion.initializer=ab"], "initializer='ab' is 2 tokens .a b</w>."),
    ],
)
def test_mistake_of_an_attack_is_named_before_anything_is_written(
    main, tmp_path, flags, message
):
    given = [f"--config.{flag}" for flag in flags]
    if flags[0].startswith("inversion"):
        given = [*INVERSION, *given]
    with pytest.raises(UserError, match=message) as caught:
        main(tmp_path / "run", *given)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_word_of_the_models_vocabulary_is_refused(main, tmp_path):
    flags = [*INVERSION, "--config.inversion.token=a</w>"]
    with pytest.raises(UserError, match="'a</w>' is in the model's vocabulary already"):
        main(tmp_path / "run", *flags, "--config.data.prompt=a a</w>")


def test_captions_without_the_token_are_named(main, tmp_path, pictures):
    folder = tmp_path / "captioned"
    folder.mkdir()
    for file in pictures.glob("*.png"):
        (folder / file.name).write_bytes(file.read_bytes())
    table = "file_name,text\n0.png,a <thing>\n1.png,a dog\n"
    (folder / "metadata.csv").write_text(table)
    flags = [*INVERSION, "--config.data.prompt=", f"--config.data.folder={folder}"]
    with pytest.raises(UserError, match="config.data: 'a dog' has no <thing>"):
        main(tmp_path / "run", *flags)
    assert not (tmp_path / "run").exists()
