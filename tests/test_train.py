# SPDX-License-Identifier: Apache-2.0
"""The train command line on the tiny model: a run's folder, resuming, mistakes."""

import json
import pathlib
import shutil

import full_models
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import tiny_model
from command_runs import (
    CONFIGS,
    IMMUNIZED,
    NO_SAMPLES,
    NOT_VERIFIED,
    UNET_FILE,
    changed,
    files,
    logged,
    recorded,
    tensors,
)
from PIL import Image

from gift_jax import convert, train
from gift_jax.models import safetensors_io, weights
from gift_jax.models.load import load_model
from gift_jax.models.sd import random_weights, stable_diffusion
from gift_jax.runtime import processes
from gift_jax.runtime.config import load_config
from gift_jax.runtime.errors import StoppedBySignal, UserError
from gift_jax.training import checkpoint

# --- whole runs -----------------------------------------------------------------------


def test_run_fills_its_folder(immunized):
    run, lines = immunized, logged(immunized)
    assert recorded(run)["harmful"]["names"] == ["bomb", "pill"]
    assert [line["step"] for line in lines] == [1, 2]
    assert {"lower/loss", "upper/loss", "lower/grad_norm"} <= set(lines[0])
    names = {key for line in lines for key in line if key.startswith("harmful_loss/")}
    assert names == {"harmful_loss/bomb", "harmful_loss/pill"}
    assert checkpoint.read_params(run / "checkpoints")[0] == 2
    assert list(run.glob("events.out.tfevents.*"))
    for name in ("before.png", "after.png"):
        with Image.open(run / "samples" / name) as image:
            assert image.size[0] > 16
    stable_diffusion.load(run / "export")


def test_pytorch_draws_the_export_alike(run_train, immunized, tmp_path, log_lines):
    """Of a finished run that is called again, with another value of the field."""
    pytest.importorskip("diffusers")
    run = shutil.copytree(immunized, tmp_path / "run")
    run_train(run, *IMMUNIZED, "--config.verify=on", embedded=True)
    (line,) = [line for line in log_lines if line.startswith("export: verified: 3 ")]
    assert "pictures differ by at most" in line


def test_export_differs_from_the_base_in_the_trained_tensors_only(
    immunized, tiny_folder
):
    export = immunized / "export"
    trained = {name for name in tensors(tiny_folder) if ".attn2.to_" in name}
    assert trained and set(changed(tiny_folder, export)) == trained
    card = pathlib.Path("README.md")
    assert files(export) == files(tiny_folder) | {card}
    text = (export / card).read_text()
    assert weights.content_hash(tiny_folder) in text and "After step 2, of" in text
    assert str(tiny_folder.parent) not in text and str(immunized.parent) not in text
    for file in files(tiny_folder) - {pathlib.Path(UNET_FILE)}:
        same = (export / file).read_bytes() == (tiny_folder / file).read_bytes()
        assert same, file


def test_resumed_run_exports_what_a_straight_one_does(
    immunized, run_train, tmp_path, monkeypatch
):
    # Fewer steps would be another schedule, and so a program that may round otherwise.
    with monkeypatch.context() as stopped:
        stopped.setattr(processes, "preempted", lambda done: done == 1)
        with pytest.raises(StoppedBySignal):
            run_train(tmp_path, *IMMUNIZED, embedded=True)
    step, halfway = checkpoint.read_params(tmp_path / "checkpoints")
    assert step == 1 and not (tmp_path / "export").exists()
    resumed = run_train(tmp_path, *IMMUNIZED, embedded=True)
    step, params = checkpoint.read_params(resumed / "checkpoints")
    assert step == 2
    assert any((params[path] != halfway[path]).any() for path in params)
    assert not changed(immunized / "export", resumed / "export")
    assert logged(immunized) == logged(resumed)
    before = (resumed / "metrics.jsonl").read_bytes()
    run_train(tmp_path, *IMMUNIZED, embedded=True)  # finished: left as it is
    assert (resumed / "metrics.jsonl").read_bytes() == before
    assert not changed(immunized / "export", resumed / "export")


def test_half_precision_leaves_the_trained_weights_whole(
    run_train, tiny_folder, tmp_path
):
    flags = ["--config.compute_dtype=bfloat16", "--config.steps=1", NO_SAMPLES]
    flags += ["--config.lower.lr=0", "--config.upper.lr=2e-4"]
    flags += ["--config.upper.schedule=constant", "--config.upper.warmup_frac=0"]
    run = run_train(tmp_path, *flags)
    updates = changed(tiny_folder, run / "export")
    rounded = max(
        np.abs(a - a.astype(jnp.bfloat16)).max()
        for name, a in tensors(tiny_folder).items()
        if name in updates
    )
    largest = max(np.abs(update).max() for update in updates.values())
    assert 1e-4 < largest < 3e-4 < rounded  # one AdamW update of 2e-4


def test_captions_and_the_models_own_images_train(
    run_train, tiny_folder, image_folder, tmp_path, monkeypatch
):
    monkeypatch.setenv("GIFT_JAX_CACHE", str(tmp_path / "cache"))
    captioned = tmp_path / "captioned"
    shutil.copytree(image_folder, captioned / "train")
    lines = (f"train/{i}.png,thing {i}\n" for i in range(4))
    (captioned / "metadata.csv").write_text("file_name,text\n" + "".join(lines))
    flags = [f"--config.harmful.folder={captioned}", "--config.harmful.prompt="]
    flags += ["--config.harmful.num_generated=0", "--config.harmful.crop=random"]
    flags += ["--config.harmful.batch=2", "--config.safe.batch=2", NO_SAMPLES]
    flags += ["--config.safe.folder=", "--config.safe.num_generated=3"]
    run = run_train(tmp_path / "run", *flags, config="sd15_style.py:smoke")
    assert changed(tiny_folder, run / "export")
    assert len(list((tmp_path / "cache" / "generated").rglob("*.png"))) == 3


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd15_style", "sd15_object", "sd15_nsfw"])
def test_sd15_config_trains_on_what_the_model_draws(
    tiny_folder, tmp_path, monkeypatch, name
):
    monkeypatch.setenv("GIFT_JAX_CACHE", str(tmp_path / "cache"))
    argv = [f"--config={CONFIGS / name}.py:smoke", f"--config.model={tiny_folder}"]
    argv += ["--config.harmful.batch=2", "--config.safe.batch=2"]  # two devices
    argv += [NO_SAMPLES, NOT_VERIFIED, f"--workdir={tmp_path / 'run'}"]
    assert train.main(argv) == 0
    assert changed(tiny_folder, tmp_path / "run" / "export")
    assert len(list((tmp_path / "cache" / "generated").rglob("*.png"))) == 2


def _without_dtype(path):
    config = json.loads(path.read_text())
    return {k: v for k, v in config.items() if k not in ("dtype", "torch_dtype")}


@pytest.mark.slow
def test_a_model_as_sd2_is_published_trains_and_exports(run_train, tmp_path):
    configs = full_models.configs("small-sd21")
    base = tmp_path / "sd21"
    random_weights.write(base, configs, "float16", shard_mib=1)
    assert len(list((base / "unet").glob("*.safetensors"))) > 1
    flags = (f"--config.model={base}", "--config.resolution=64", NO_SAMPLES)
    run = run_train(tmp_path / "run", *flags)
    differ = set()
    for source in (p for p in base.rglob("*") if p.is_file()):
        exported = run / "export" / source.relative_to(base)
        same = exported.read_bytes() == source.read_bytes()
        if source.relative_to(base) == pathlib.Path("text_encoder/config.json"):
            assert _without_dtype(exported) == _without_dtype(source)
            continue  # labeled float32, which today's libraries load as it is
        assert same or source.parent.name == "unet", source
        if source.suffix == ".safetensors" and not same:
            old, new = map(safetensors.numpy.load_file, (source, exported))
            assert {a.dtype for a in new.values()} == {np.dtype(np.float16)}
            differ |= {k for k in old if old[k].tobytes() != new[k].tobytes()}
    assert differ and all(".attn2." in name for name in differ)
    pytest.importorskip("torch")
    from diffusers import UNet2DConditionModel

    _, info = UNet2DConditionModel.from_pretrained(
        run / "export" / "unet", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]


# --- the other methods ----------------------------------------------------------------


def test_gift_adversarial_preserves_the_model_and_goes_on_to_fine_tune(
    run_train, tiny_folder, tmp_path
):
    flags = ["--config.gift_adversarial.post_finetune.steps=1", NO_SAMPLES]
    flags += ["--config.steps=1", "--config.gift_adversarial.inner_steps=1"]
    config = "emoji_gift_adversarial.py:smoke"
    run = run_train(tmp_path / "run", *flags, config=config, embedded=True)
    first, last = logged(run), logged(run / "post_finetune")
    assert first[0]["lower/loss"] < 1e-9 < last[0]["lower/loss"]
    updates = changed(tiny_folder, run / "export")
    assert updates and all(".attn2." in name for name in updates)
    out = tmp_path / "converted"
    checkpoints = run / "post_finetune" / "checkpoints"
    convert.main(["to-diffusers", f"--checkpoint={checkpoints}", f"--out={out}"])
    assert not changed(run / "export", out)


GATED_UNET = {  # of two sizes, as a gate needs, and little else
    "block_out_channels": [64, 64],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
}


def test_gate_is_in_the_export_as_pytorch_computes_it(tmp_path, monkeypatch):
    monkeypatch.setenv("GIFT_JAX_CACHE", str(tmp_path / "cache"))
    base = tiny_model.write_tiny(tmp_path / "base", unet=GATED_UNET)
    argv = [f"--config={CONFIGS}/emoji_gift_gate.py:smoke", f"--config.model={base}"]
    argv += [NO_SAMPLES, NOT_VERIFIED, f"--workdir={tmp_path / 'run'}"]
    assert train.main(argv) == 0
    detected = [line["step"] for line in logged(tmp_path / "run")]
    preserved = [line["step"] for line in logged(tmp_path / "run" / "preserve")]
    assert (detected, preserved) == ([1, 2], [1])
    export, out = tmp_path / "run" / "export", tmp_path / "converted"
    flag = f"--checkpoint={tmp_path / 'run' / 'checkpoints'}"
    convert.main(["to-diffusers", flag, f"--out={out}"])  # of the last phase
    assert changed(base, export) and not changed(export, out)
    tensors = f"--out={tmp_path / 'detector.safetensors'}"
    with pytest.raises(UserError, match=r"has PyTorch shape \[8.*; of a later phase"):
        convert.main(["to-unet-state", flag, "--step=2", tensors])
    # a detector of two steps closes at once, if at all: both sides have to do the same
    torch = pytest.importorskip("torch")
    from diffusers import UNet2DConditionModel

    model = load_model(str(export))
    rng = np.random.default_rng(0)
    z = rng.normal(size=(3, 4, 8, 8)).astype(np.float32)
    text = rng.normal(size=(3, 5, 32)).astype(np.float32)
    params = model.params["unet"]
    ours, _ = model.denoiser.predict(params, z, np.full(3, 7), {"states": text}, ())
    unet = UNet2DConditionModel.from_pretrained(export / "unet")
    with torch.no_grad():
        theirs = unet(torch.tensor(z), 7, torch.tensor(text)).sample.numpy()
    tiny_model.check_equal("a gated UNet", {"out": ours}, {"out": theirs})
    kernel = params["conv_in"]["kernel"]
    assert np.abs(kernel[..., -8:]).max() > 100 * np.abs(kernel[..., :-8]).max()


def test_gate_is_refused_where_other_parameters_are_to_stay(tmp_path):
    argv = [f"--config={CONFIGS}/emoji_gift_gate.py:smoke"]
    argv += ["--config.trainable=attention", f"--workdir={tmp_path / 'run'}"]
    match = "config.trainable=attention is not for method=gift_gate.*trainable=all"
    with pytest.raises(UserError, match=match):
        train.main(argv)
    assert not (tmp_path / "run").exists()


def test_imma_exports_its_attention_alone(run_train, tiny_folder, tmp_path):
    config = "emoji_baselines.py:imma_lora_smoke"
    run = run_train(tmp_path / "run", NO_SAMPLES, config=config, embedded=True)
    updates = changed(tiny_folder, run / "export")
    assert updates and all(".attn2." in name for name in updates)
    argv = [f"--checkpoint={run / 'checkpoints'}", f"--out={tmp_path / 'out'}"]
    convert.main(["to-diffusers", *argv])
    assert not changed(run / "export", tmp_path / "out")


def test_esd_walks_the_models_trajectories(run_train, tiny_folder, tmp_path):
    config = "emoji_baselines.py:esd_smoke"
    run = run_train(tmp_path, NO_SAMPLES, config=config, embedded=True)
    updates = changed(tiny_folder, run / "export")
    assert updates and all(".attn2." in name for name in updates)
    assert "esd/loss" in logged(run)[0]


def test_uce_edits_keys_and_values_and_what_it_made_is_edited_again(
    run_train, tiny_folder, tmp_path
):
    config, base = "emoji_baselines.py:uce_smoke", tiny_folder
    for name in ("once", "twice"):
        flags = (f"--config.model={base}", NO_SAMPLES)
        run = run_train(tmp_path / name, *flags, config=config)
        parts = {tuple(n.split(".")[-3:-1]) for n in changed(base, run / "export")}
        assert parts == {("attn2", "to_k"), ("attn2", "to_v")}
        assert recorded(run)["base_sha256"] == weights.content_hash(base)
        assert not (run / "metrics.jsonl").exists()
        base = run / "export"


@pytest.mark.parametrize("name", ["emoji_baselines", "sd15_baselines"])
def test_every_baseline_is_a_valid_config(name):
    variants = ("esd", "uce", "imma", "imma_lora", "maximize_prior", "esd_smoke")
    configs = [load_config(f"{CONFIGS / name}.py:{variant}") for variant in variants]
    methods = {train.resolve(cfg).method for cfg in configs}
    assert methods == {"esd", "uce", "imma", "maximize_prior"}


# --- mistakes -------------------------------------------------------------------------


def mistake(run_train, tmp_path, *flags, match, **kwargs):
    with pytest.raises(UserError, match=match) as caught:
        run_train(tmp_path / "run", *flags, **kwargs)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()  # or a corrected run could not use it


@pytest.mark.parametrize(
    "flag, message",
    [
        ("stepz=3", "config.stepz is no field.*did you mean config.steps"),
        ("method=gfit", "config.method='gfit' is not one of.*gift"),
        ("gift.layers=()", "config.gift.layers is empty"),
        ("upper.lr=nan", "config.upper.lr=nan must be finite"),
        ("harmful.batch=3", "harmful.batch=3 must divide by 2 devices.*batch=2"),
        (
            "hardware.grad_accum_steps=3",
            "harmful.batch=4 must divide by config.hardware.grad_accum_steps=3; try "
            "--config.harmful.batch=3",
        ),
        ("samples.prompts=()", "config.samples.prompts is empty"),
        ("samples.steps=1001", "config.samples.steps=1001 must be at most 1000"),
        ("samples.scheduler=eular", "config.samples.scheduler='eular' is not one of"),
        ("model=nowhere", "nowhere.*no such folder"),
        ("safe.folder=nowhere", "config.safe.folder=nowhere is not a folder"),
        ("safe.prompt=", "config.safe.prompt is empty"),
        ("safe.names=cat face", "config.safe: give only one.*not names and folder"),
    ],
)
def test_mistake_is_named_before_anything_is_written(
    run_train, tmp_path, flag, message
):
    flags = "--config.hardware.cpu_devices=2", f"--config.{flag}"
    mistake(run_train, tmp_path, *flags, match=message)


def test_config_of_another_method_is_named(run_train, tmp_path):
    message = "config.imma is missing: this config is of another method"
    mistake(run_train, tmp_path, "--config.method=imma", match=message)


@pytest.mark.parametrize(
    "flag, message",
    [
        ("harmful.names=bom", "config.harmful.names: concept 'bom'.*mean 'bomb'"),
        ("safe.styles=notto", "config.safe.styles: style 'notto'.*'noto'"),
        ("safe.template={thing}", r"config.safe.template='\{thing\}' may use only"),
    ],
)
def test_what_is_not_in_the_data_is_named(run_train, tmp_path, flag, message):
    mistake(run_train, tmp_path, f"--config.{flag}", match=message, embedded=True)


def test_empty_or_unreadable_image_folder_is_named(run_train, tmp_path):
    folder = tmp_path / "image_folder"
    folder.mkdir()
    flag = f"--config.harmful.folder={folder}"
    mistake(run_train, tmp_path, flag, match="config.harmful.folder=.* has no ")
    (folder / "a.png").write_bytes(b"no image")
    mistake(run_train, tmp_path, flag, match="a.png cannot be read as an? ")


@pytest.mark.parametrize(
    "file, content, message",
    [
        ("model_index.json", None, "model_index.json: no such file"),
        ("model_index.json", b"{", "model_index.json: not valid JSON"),
        ("unet/config.json", None, "config.json: no such file"),
        (UNET_FILE, b"x", "truncated or not"),
        ("vae/diffusion_pytorch_model.safetensors", None, "no diffusion_pytorch_model"),
        ("scheduler/scheduler_config.json", b"[", "scheduler_config.json: not valid"),
        ("tokenizer/vocab.json", None, "vocab.json: no such file"),
    ],
)
def test_malformed_model_folder_is_named(
    run_train, tiny_folder, tmp_path, file, content, message
):
    model = tmp_path / "model"
    shutil.copytree(tiny_folder, model)
    (model / file).unlink()
    if content is not None:
        (model / file).write_bytes(content)
    mistake(run_train, tmp_path, f"--config.model={model}", match=message)


def test_zero_steps_export_the_base_and_another_run_is_refused_its_folder(
    run_train, tiny_folder, tmp_path, monkeypatch
):
    flags = ("--config.steps=0", NO_SAMPLES)
    run = run_train(tmp_path / "run", *flags)
    assert not changed(tiny_folder, run / "export")
    monkeypatch.setattr(train, "load_group", None)  # before any data is made
    with pytest.raises(UserError, match=r"another config \(upper.lr was .*, is 0.5\)"):
        run_train(run, *flags, "--config.upper.lr=0.5")
    model = tmp_path / "model"
    shutil.copytree(tiny_folder, model)
    entry = safetensors_io.read_header(model / UNET_FILE)["conv_in.bias"]
    with (model / UNET_FILE).open("r+b") as f:
        f.seek(entry.begin)
        f.write(b"\0\0\0\0")
    with pytest.raises(UserError, match="another config.*base_sha256 was"):
        run_train(run, *flags, f"--config.model={model}")
