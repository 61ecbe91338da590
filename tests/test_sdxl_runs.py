# SPDX-License-Identifier: Apache-2.0
"""SDXL through the commands: no flag says so, and PyTorch loads what they write."""

import jax
import numpy as np
import pytest
import safetensors.numpy
import tiny_model
from command_runs import CONFIGS, NO_SAMPLES, changed
from PIL import Image

from gift_jax import attack, convert, generate, train
from gift_jax.models.sd import stable_diffusion

pytestmark = pytest.mark.filterwarnings("ignore")  # diffusers' and peft's own
TEXT = ("text_encoder/model.safetensors", "text_encoder_2/model.safetensors")


@pytest.fixture
def images(tmp_path):
    """Images of two sizes, neither the model's."""
    folder = tmp_path / "images"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i, shape in enumerate([(32, 64, 3), (48, 24, 3)]):
        pixels = rng.integers(0, 256, shape, np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return folder


def run_attack(folder, images, workdir, variant, *flags, prompt="a sks thing"):
    argv = [f"--config={CONFIGS / 'sdxl_attack.py'}:{variant}"]
    argv += [f"--config.model={folder}", f"--config.data.folder={images}"]
    argv += [f"--config.data.prompt={prompt}", f"--workdir={workdir}"]
    argv += ["--config.data.num_generated=0", "--config.data.batch=2", NO_SAMPLES]
    assert attack.main([*argv, *flags]) == 0
    return workdir


def pipeline(folder):
    diffusers = pytest.importorskip("diffusers")
    pipe = diffusers.StableDiffusionXLPipeline.from_pretrained(
        str(folder), add_watermarker=False
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def drawn(pipe, prompt):
    import torch

    return pipe(
        prompt,
        num_inference_steps=2,
        height=16,
        width=16,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
    ).images


@pytest.mark.parametrize(
    "config",
    [
        "sd15_baselines.py:uce_smoke",  # no step to compile
        pytest.param("sdxl_object.py:smoke", marks=pytest.mark.slow),
    ],
)
def test_train(tiny_xl_folder, images, tmp_path, monkeypatch, config):
    monkeypatch.setenv("GIFT_JAX_CACHE", str(tmp_path / "cache"))
    argv = [f"--config={CONFIGS / config}", NO_SAMPLES]
    argv += [f"--config.model={tiny_xl_folder}", f"--workdir={tmp_path / 'run'}"]
    argv += [f"--config.harmful.folder={images}", "--config.harmful.num_generated=0"]
    argv += ["--config.harmful.batch=2", "--config.safe.batch=2"]
    argv += ["--config.harmful.prompt=a thing"]
    assert train.main(argv) == 0
    export = tmp_path / "run" / "export"
    moved = changed(tiny_xl_folder, export)
    assert moved and all(".attn2." in name for name in moved)
    assert not any(changed(tiny_xl_folder, export, file) for file in TEXT)
    assert drawn(pipeline(export), "a dog").std() > 0.01


@pytest.mark.slow
def test_gate(images, tmp_path, monkeypatch):
    monkeypatch.setenv("GIFT_JAX_CACHE", str(tmp_path / "cache"))
    base = tiny_model.write_tiny_xl(tmp_path / "base", block_out_channels=[64, 128])
    argv = [f"--config={CONFIGS / 'sdxl_gift_gate.py'}:smoke", NO_SAMPLES]
    argv += [f"--config.model={base}", f"--workdir={tmp_path / 'run'}"]
    argv += [f"--config.harmful.folder={images}", "--config.harmful.prompt=a thing"]
    argv += ["--config.harmful.num_generated=0"]
    argv += [f"--config.{group}.shift=4" for group in ("harmful", "safe")]
    assert train.main(argv) == 0
    assert (tmp_path / "run" / "preserve" / "metrics.jsonl").is_file()
    export = tmp_path / "run" / "export"
    kernel = changed(base, export)["conv_in.weight"]
    assert np.abs(kernel).max() > 100 * 0.3  # of the tiny model's
    assert not any(changed(base, export, file) for file in TEXT)
    assert np.isfinite(drawn(pipeline(export), "a dog")).all()


@pytest.mark.slow
def test_dreambooth_of_both_text_encoders(tiny_xl_folder, images, tmp_path):
    run = run_attack(
        tiny_xl_folder,
        images,
        tmp_path / "run",
        "dreambooth_smoke",
        "--config.dreambooth.train_text_encoder=true",
        "--config.optimizer.weight_decay=0.0",
    )
    for file in ("unet/diffusion_pytorch_model.safetensors", *TEXT):
        assert changed(tiny_xl_folder, run / "export", file), file
    # nothing reads the first encoder's last layer, nor its final norm
    unread = "text_model.final_layer_norm.weight"
    assert unread not in changed(tiny_xl_folder, run / "export", TEXT[0])
    assert unread in changed(tiny_xl_folder, run / "export", TEXT[1])
    assert drawn(pipeline(run / "export"), "a dog").std() > 0.01


@pytest.mark.slow
def test_lora_of_both_text_encoders(tiny_xl_folder, images, tmp_path):
    run = run_attack(
        tiny_xl_folder,
        images,
        tmp_path / "run",
        "lora_text_smoke",
        "--config.optimizer.lr=0.1",
    )
    merged = drawn(pipeline(run / "export"), "a sks thing")
    before = drawn(pipeline(tiny_xl_folder), "a sks thing")
    assert np.abs(merged - before).max() > 0.02
    for name in ("pytorch_lora_weights", "kohya"):
        pipe = pipeline(tiny_xl_folder)
        pipe.load_lora_weights(str(run / "lora" / f"{name}.safetensors"))
        components = set(pipe.get_list_adapters())
        assert components == {"unet", "text_encoder", "text_encoder_2"}, name
        picture = drawn(pipe, "a sks thing")
        assert np.abs(picture - merged).max() < 1 / 255, name
        out = tmp_path / name
        argv = ["--model", str(tiny_xl_folder), "--prompt", "a", "--out", str(out)]
        argv += ["--num", "2", "--steps", "2", "--lora"]
        assert generate.main([*argv, f"{run}/lora/{name}.safetensors"]) == 0
    images = [tmp_path / n / "grid.png" for n in ("pytorch_lora_weights", "kohya")]
    np.testing.assert_array_equal(*(np.asarray(Image.open(i)) for i in images))


@pytest.mark.slow
def test_textual_inversion_in_both_text_encoders(tiny_xl_folder, images, tmp_path):
    run = run_attack(
        tiny_xl_folder,
        images,
        tmp_path / "run",
        "textual_inversion_smoke",
        "--config.textual_inversion.vectors=2",
        "--config.optimizer.lr=0.5",
        prompt="a <thing>",
    )
    file = run / "learned_embeds.safetensors"
    learned = safetensors.numpy.load_file(file)
    assert {n: a.shape for n, a in learned.items()} == {
        "clip_l": (2, 32),
        "clip_g": (2, 48),
    }
    model = stable_diffusion.load(run / "export")
    for module in model.text.modules:
        assert module.config.vocab_size == 516
    exported = drawn(pipeline(run / "export"), "a <thing>")
    pipe = pipeline(tiny_xl_folder)
    for name, encoder, tokenizer in (
        ("clip_l", pipe.text_encoder, pipe.tokenizer),
        ("clip_g", pipe.text_encoder_2, pipe.tokenizer_2),
    ):
        import torch

        pipe.load_textual_inversion(
            torch.tensor(learned[name]),
            token="<thing>",
            text_encoder=encoder,
            tokenizer=tokenizer,
        )
    np.testing.assert_allclose(drawn(pipe, "a <thing>"), exported, atol=1 / 255)
    out = tmp_path / "drawn"
    argv = ["--model", str(tiny_xl_folder), "--prompt", "a <thing>", "--out", str(out)]
    argv += ["--num", "1", "--steps", "2", "--textual-inversion", f"{file}:<thing>"]
    assert generate.main(argv) == 0
    alone = tmp_path / "of_export"
    argv = ["--model", str(run / "export"), "--prompt", "a <thing>", "--num", "1"]
    assert generate.main([*argv, "--steps", "2", "--out", str(alone)]) == 0
    pictures = (np.asarray(Image.open(d / "000-000.png")) for d in (out, alone))
    np.testing.assert_array_equal(*pictures)


def test_images_have_their_own_sizes(tiny_xl, images):
    from gift_jax.data import cache, pairs

    spec = pairs.PairsSpec(folder=str(images), prompt="a", size=16)
    data = pairs.load_pairs(spec)
    # resized to 16x32, of which 8 columns are cut off at each side; and to 32x16
    frames = [[32, 64, 0, 8], [48, 24, 8, 0]]
    np.testing.assert_array_equal(data.frames, frames)
    group = cache.DataGroup(folder=str(images), prompt="a", augmented_copies=2)
    source = cache.cached_source(tiny_xl, data, group, jax.random.key(0))
    sizes = source.take(np.arange(4))["cond"]["sizes"]
    np.testing.assert_array_equal(sizes[:, :4], frames * 2)
    np.testing.assert_array_equal(sizes[:, 4:], 16)
    ids = cache.cached_source(tiny_xl, data, group, jax.random.key(0), ids=True)
    batch = ids.take(np.arange(2))
    assert batch["ids"].shape == (2, *tiny_xl.ids_shape)
    np.testing.assert_array_equal(batch["cond"]["sizes"], sizes[:2])


def test_round_trip_is_byte_for_byte(tiny_xl_folder, tmp_path):
    argv = ["from-diffusers", "--model", str(tiny_xl_folder)]
    assert convert.main([*argv, "--out", str(tmp_path / "orbax")]) == 0
    argv = ["to-diffusers", "--checkpoint", str(tmp_path / "orbax")]
    assert convert.main([*argv, "--out", str(tmp_path / "back")]) == 0
    files = [p for p in tiny_xl_folder.rglob("*") if p.is_file()]
    assert len(files) > 10
    for file in files:
        other = tmp_path / "back" / file.relative_to(tiny_xl_folder)
        assert other.read_bytes() == file.read_bytes(), file
