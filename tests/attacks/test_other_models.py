# SPDX-License-Identifier: Apache-2.0
"""Attacks that use another model or another word: transplant, interpolation, edits."""

import numpy as np
import pytest
import safetensors.numpy
from command_runs import CONFIGS, TEXT_FILE, UNET_FILE
from flax.traverse_util import flatten_dict
from tiny_model import WHOLE_UNET, write_pictures, write_tiny

from gift_jax import attack
from gift_jax.attacks import edit_back, retain_then_teach
from gift_jax.models import closed_form
from gift_jax.models.load import load_model
from gift_jax.models.sd import adapters
from gift_jax.runtime.errors import UserError


@pytest.fixture(scope="module")
def defended(tiny_folder, tmp_path_factory):
    """The tiny model with other weights of its UNet."""
    folder = tmp_path_factory.mktemp("defended") / "sd"
    write_tiny(folder)
    tensors = safetensors.numpy.load_file(folder / UNET_FILE)
    rng = np.random.default_rng(5)
    for name, a in tensors.items():
        tensors[name] = a + 0.01 * rng.normal(size=a.shape).astype(np.float32)
    safetensors.numpy.save_file(tensors, folder / UNET_FILE, {"format": "pt"})
    return folder


def run(name, workdir, model, images, *flags):
    """Runs a variant of the emoji's attack on images in a folder."""
    argv = [f"--config={CONFIGS / 'emoji_attack.py'}:{name}_smoke"]
    argv += [f"--workdir={workdir}", f"--config.model={model}"]
    argv += ["--config.samples.num=0", "--config.verify=off", *flags]
    if name != "interpolation":
        argv += ["--config.data.names=()", f"--config.data.folder={images}"]
        argv += ["--config.data.prompt=a sks thing"]
    assert attack.main(argv) == 0
    return workdir / "export"


def unet(folder):
    return safetensors.numpy.load_file(folder / UNET_FILE)


# --- transplant -----------------------------------------------------------------------


def test_transplanted_lora_is_the_originals_file_on_the_defended_base(
    tiny_folder, defended, image_folder, tmp_path
):
    flags = f"--config.transplant.original={tiny_folder}", "--config.optimizer.lr=0.05"
    export = run("transplant", tmp_path / "run", defended, image_folder, *flags)
    file = tmp_path / "run" / "lora" / "pytorch_lora_weights.safetensors"
    added = adapters.AdapterFiles(lora=(str(file),))
    # the file on the base: equal to PyTorch's in models/sd/test_adapters.py
    expected = flatten_dict(load_model(str(defended), added=added).params["unet"])
    ours = flatten_dict(load_model(str(export)).params["unet"])
    before = flatten_dict(load_model(str(defended)).params["unet"])
    assert max(np.abs(ours[p] - before[p]).max() for p in before) > 1e-3
    for path, array in expected.items():
        np.testing.assert_allclose(ours[path], array, atol=1e-6)
    kohya = safetensors.numpy.load_file(file.with_name("kohya.safetensors"))
    name = next(name for name in safetensors.numpy.load_file(file) if "down" in name)
    name = name.removeprefix("unet.").removesuffix(".lora.down.weight")
    assert f"lora_unet_{name.replace('.', '_')}.lora_down.weight" in kohya
    # trained where nothing resists: another base would have given another update
    direct = run(
        "lora",
        tmp_path / "direct",
        defended,
        image_folder,
        "--config.optimizer.lr=.05",
        "--config.lora.rank=8",
    )
    assert any((unet(direct)[n] != a).any() for n, a in unet(export).items())


@pytest.mark.slow
def test_transplanted_difference_is_that_of_the_original(
    tiny_folder, defended, image_folder, tmp_path
):
    lr = "--config.optimizer.lr=1e-3"
    trained = run("dreambooth", tmp_path / "trained", tiny_folder, image_folder, lr)
    flags = f"--config.transplant.original={tiny_folder}", lr
    flags += ("--config.transplant.update=full",)
    export = run("transplant", tmp_path / "run", defended, image_folder, *flags)
    start, end, before, after = map(unet, (tiny_folder, trained, defended, export))
    assert max(np.abs(end[name] - start[name]).max() for name in start) > 1e-3
    for name in start:
        moved = before[name] + (end[name] - start[name])
        np.testing.assert_allclose(after[name], moved, atol=1e-6)


def test_original_of_another_shape_is_one_line(defended, tmp_path, image_folder):
    other = write_tiny(tmp_path / "other", unet=WHOLE_UNET)
    flag = f"--config.transplant.original={other}"
    with pytest.raises(UserError, match="its UNet is of another shape"):
        run("transplant", tmp_path / "run", defended, image_folder, flag)
    assert not (tmp_path / "run" / "export").exists()


# --- interpolation --------------------------------------------------------------------


def test_interpolation_goes_part_of_the_way(tiny_folder, defended, tmp_path):
    ours, theirs = unet(defended), unet(tiny_folder)
    assert any((ours[name] != theirs[name]).any() for name in ours)
    for strength in (0.25, 1.0):
        flags = (f"--config.interpolation.sibling={tiny_folder}",)
        flags += (f"--config.interpolation.strength={strength}",)
        workdir = tmp_path / str(strength)
        moved = unet(run("interpolation", workdir, defended, "", *flags))
        for name, a in moved.items():
            expected = (1 - strength) * ours[name] + strength * theirs[name]
            np.testing.assert_allclose(a, expected, atol=1e-6)


def test_sibling_of_another_shape_is_one_line(defended, tmp_path):
    other = write_tiny(tmp_path / "other", unet=WHOLE_UNET)
    with pytest.raises(UserError, match=r"config\.interpolation\.sibling="):
        run(
            "interpolation",
            tmp_path / "run",
            defended,
            "",
            f"--config.interpolation.sibling={other}",
        )


# --- edits of a word ------------------------------------------------------------------


def test_edit_back_gives_a_word_the_keys_and_values_of_another(
    tiny_folder, tmp_path, image_folder
):
    flags = "--config.edit_back.source=a cat", "--config.edit_back.regularization=1e-3"
    export = run("edit_back", tmp_path / "run", tiny_folder, image_folder, *flags)
    before, after = load_model(str(tiny_folder)), load_model(str(export))
    text = (tiny_folder / TEXT_FILE).read_bytes()
    assert (export / TEXT_FILE).read_bytes() == text
    states, ids = (
        [np.asarray(f([prompt])) for prompt in ("a sks thing", "a cat")]
        for f in (lambda p: before.encode_text(p)["states"], before.tokenize)
    )
    end = before.tokenizer.eos_token_id
    word, source = closed_form.tail_states(states[0], ids[0], states[1], ids[1], end)
    assert np.abs(word - source).max() > 1e-2
    old, new = (flatten_dict(m.params["unet"], sep="/") for m in (before, after))
    kernels = [p for p in old if "attn2/to_k" in p or "attn2/to_v" in p]
    assert kernels and all((old[p] == new[p]).all() for p in set(old) - set(kernels))
    for path in kernels:
        far = np.abs(word @ old[path] - source @ old[path]).max()
        assert np.abs(word @ new[path] - source @ old[path]).max() < 0.05 * far


def test_source_of_an_edit_is_needed():
    with pytest.raises(UserError, match=r"config\.edit_back\.source"):
        edit_back.EditBack().check("config.edit_back")


# --- two phases -----------------------------------------------------------------------


def test_retain_comes_first_then_the_concept():
    seen = []

    def teach(state, frozen, batch, key):
        seen.append(float(batch["data"]["mean"]))
        return state, {}

    class State:
        def __init__(self, step):
            self.step = step

    step = retain_then_teach.make_step(teach, 2)
    batch = {"data": {"mean": 7.0}, "retain": {"mean": 3.0}}
    for number in range(4):
        step(State(number), {}, batch, None)
    assert seen == [3.0, 3.0, 7.0, 7.0]


@pytest.mark.parametrize(
    "flags, message",
    [
        (
            ["--config.retain.batch=2"],
            "config.retain.batch=2 must be config.data.batch",
        ),
        (["--config.steps=1"], "retain_steps=1 must be less than config.steps=1"),
    ],
)
def test_phases_that_do_not_fit_are_one_line(
    flags, message, tiny_folder, tmp_path, image_folder
):
    write_pictures(tmp_path, 2, 1)
    flags = ["--config.retain.batch=4", "--config.retain.names=()", *flags]
    flags += [f"--config.retain.folder={tmp_path}", "--config.retain.prompt=a thing"]
    with pytest.raises(UserError, match=message):
        run("retain_then_teach", tmp_path / "run", tiny_folder, image_folder, *flags)
