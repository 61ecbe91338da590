# SPDX-License-Identifier: Apache-2.0
"""Single files: the tensors and configs that diffusers reads, or one clear line."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import single_files
from absl import logging

from gift_jax import convert
from gift_jax.models import load, safetensors_io
from gift_jax.models.sd import architectures, stable_diffusion
from gift_jax.models.sd.single_file import from_file, sources
from gift_jax.models.sd.single_file.families import FAMILIES
from gift_jax.runtime.errors import UserError

UNET, VAE = "model.diffusion_model.", "first_stage_model."
UNET_FILE = "unet/diffusion_pytorch_model.safetensors"
CLASSES = {
    "unet": ("diffusers", "UNet2DConditionModel"),
    "vae": ("diffusers", "AutoencoderKL"),
    "text_encoder": ("transformers", "CLIPTextModel"),
    "text_encoder_2": ("transformers", "CLIPTextModelWithProjection"),
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return single_files.write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def small(tmp_path_factory, tokenizer):
    """name of a family -> (a small file, the folder that it becomes)."""
    cases, root = {}, tmp_path_factory.mktemp("small")
    for name in single_files.NAMES:
        file = single_files.write_small(root / f"{name}.safetensors", name)
        to_folder(file, root / name, tokenizer)
        cases[name] = file, root / name
    return cases


def to_folder(file, out, tokenizer, *flags):
    argv = ["from-single-file", file, "--out", out, "--tokenizer", tokenizer, *flags]
    assert convert.main([str(arg) for arg in argv]) == 0
    return out


def to_file(folder, out, *flags):
    argv = ["to-single-file", "--model", folder, "--out", out, *flags]
    assert convert.main([str(arg) for arg in argv]) == 0
    return out


def theirs(name, checkpoint, configs):
    """Returns {component: tensors by diffusers' names}, converted by diffusers."""
    from diffusers.loaders import single_file_utils as single

    result = {
        "unet": single.convert_ldm_unet_checkpoint(dict(checkpoint), configs["unet"]),
        "vae": single.convert_ldm_vae_checkpoint(dict(checkpoint), configs["vae"]),
    }
    for component, text in FAMILIES[name].text.items():
        if text.is_open_clip:
            width = configs[component]["hidden_size"]
            model = SimpleNamespace(config=SimpleNamespace(hidden_size=width))
            result[component] = single.convert_open_clip_checkpoint(
                model, dict(checkpoint), prefix=text.prefix
            )
        else:
            result[component] = single.convert_ldm_clip_checkpoint(dict(checkpoint))
    return result


# --- as diffusers ---------------------------------------------------------------------


@pytest.mark.parametrize("name", single_files.NAMES)
def test_a_published_file_has_the_published_configs_and_tensors(name, tmp_path):
    """Of full size, by its header alone; OpenCLIP's last layer of 2.x is not used."""
    torch = pytest.importorskip("torch")
    import diffusers
    import transformers
    from diffusers.loaders import single_file_utils

    published = architectures.MODELS[name]
    parts = single_files.original_shapes(name, published)
    shapes = {n: shape for part in parts.values() for n, shape in part.items()}
    if name == "sd21":
        prefix = "cond_stage_model.model."
        block = f"{prefix}transformer.resblocks."
        for tensor, shape in list(shapes.items()):
            if tensor.startswith(f"{block}22."):
                shapes[tensor.replace(f"{block}22.", f"{block}23.")] = shape
        shapes |= {f"{prefix}text_projection": (1024, 1024)}
        shapes |= {f"{prefix}logit_scale": ()}
    header = {"modelspec.prediction_type": "v"} if name == "sd21" else {}
    file = single_files.write_without_data(tmp_path / "a.safetensors", shapes, header)
    model = from_file.SingleFile(file, from_file.Options())
    scheduler = {"prediction_type": "epsilon"} | published["scheduler"]
    for component, config in model.configs.items():
        expected = scheduler if component == "scheduler" else published[component]
        assert config == expected, component

    meta = {n: torch.empty(shape, device="meta") for n, shape in shapes.items()}
    kind = single_file_utils.infer_diffusers_model_type(meta)
    assert kind == {"sd15": "v1", "sd21": "v2", "sdxl": "xl_base"}[name]
    converted = theirs(name, meta, model.configs)
    for component, table in model.tables(None).items():
        ours = {n: shape for n, (_, shape, _) in table.items()}
        assert ours == {n: tuple(a.shape) for n, a in converted[component].items()}
        config = model.configs[component]
        with torch.device("meta"):
            library, cls = CLASSES[component]
            if library == "diffusers":
                module = getattr(diffusers, cls).from_config(config)
            else:
                own = transformers.CLIPTextConfig(**config)
                module = getattr(transformers, cls)(own)
        expected = {n: tuple(a.shape) for n, a in module.state_dict().items()}
        wrapped = any(n.startswith("text_model.") for n in expected)
        if component == "text_encoder" and not wrapped:
            ours = {n.removeprefix("text_model."): s for n, s in ours.items()}
        ours = {n: s for n, s in ours.items() if not n.endswith("position_ids")}
        assert ours == expected, component


@pytest.mark.parametrize("name", single_files.NAMES)
def test_tensors_are_those_of_diffusers_byte_for_byte(name, small, tmp_path):
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file, save_file

    file, folder = small[name]
    configs = {
        component: safetensors_io.read_json(folder / component / "config.json")
        for component in FAMILIES[name].text.keys() | {"unet", "vae"}
    }
    converted = theirs(name, load_file(file), configs)
    assert {t.dtype for t in converted["text_encoder"].values()} == {
        torch.bfloat16,
        *([torch.int64] if name != "sd21" else []),
    }
    for component, tensors in converted.items():
        copy = tmp_path / f"{component}.safetensors"
        save_file({n: t.contiguous() for n, t in tensors.items()}, copy)
        ours = single_files.contents(folder / component)
        assert ours == single_files.contents(copy), component


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("name", single_files.NAMES)
def test_a_pipeline_of_pytorch_loads_the_folder(name, small):
    """Without an argument; its weights are those of diffusers' own reader."""
    torch = pytest.importorskip("torch")
    import diffusers

    file, folder = small[name]
    xl = name == "sdxl"
    cls = (
        diffusers.StableDiffusionXLPipeline if xl else diffusers.StableDiffusionPipeline
    )
    pipe = cls.from_pretrained(folder)
    other = cls.from_single_file(str(file), config=str(folder), local_files_only=True)
    for component in FAMILIES[name].text.keys() | {"unet", "vae"}:
        ours = getattr(pipe, component).state_dict()
        for tensor, value in getattr(other, component).state_dict().items():
            assert torch.equal(ours[tensor].float(), value.float()), tensor
    images = pipe("a cat", num_inference_steps=1, output_type="np").images
    assert images.shape == (1, 64, 64, 3)
    assert pipe.tokenizer.pad_token == ("!" if name == "sd21" else "<|endoftext|>")
    if xl:
        assert pipe.tokenizer_2.pad_token == "!"
    expected = "v_prediction" if name == "sd21" else "epsilon"
    assert pipe.scheduler.config.prediction_type == expected


@pytest.mark.parametrize("name", single_files.NAMES)
def test_our_loader_reads_the_folder(name, small):
    model = stable_diffusion.load(small[name][1])
    assert model.image_size == 64
    expected = "v_prediction" if name == "sd21" else "epsilon"
    assert model.prediction_type == expected


# --- there and back -------------------------------------------------------------------


@pytest.mark.parametrize("name", single_files.NAMES)
def test_there_and_back_every_tensor_is_the_same(name, small, tokenizer, tmp_path):
    file, folder = small[name]
    again = to_file(folder, tmp_path / "again.safetensors")
    assert single_files.contents(again) == single_files.contents(file)
    header = safetensors_io.read_metadata(again)
    assert header.items() >= single_files.header(name).items()
    assert header["modelspec.architecture"].startswith(FAMILIES[name].architecture)
    back = to_folder(again, tmp_path / "back", tokenizer)
    for component in ("unet", "vae", *FAMILIES[name].text):
        ours, first = (f / component for f in (back, folder))
        assert single_files.contents(ours) == single_files.contents(first)
        configs = [(f / "config.json").read_text() for f in (ours, first)]
        assert configs[0] == configs[1]


def test_a_dtype_is_cast_to_in_either_direction(small, tokenizer, tmp_path):
    file, folder = small["sd15"]
    out = to_folder(file, tmp_path / "out", tokenizer, "--dtype", "bf16")
    again = to_file(folder, tmp_path / "a.safetensors", "--dtype", "fp16")
    for source, dtype in ((out, "BF16"), (again, "F16")):
        dtypes = {n: d for n, (d, *_) in single_files.contents(source).items()}
        assert {d for n, d in dtypes.items() if "position_ids" not in n} == {dtype}


def test_zero_snr_and_v_of_xl_are_marks_in_the_file(small, tokenizer, tmp_path):
    mark = np.zeros(0, np.float32)
    file = single_files.write_small(
        tmp_path / "v.safetensors", "sdxl", v_pred=mark, ztsnr=mark
    )
    folder = to_folder(file, tmp_path / "v", tokenizer)
    config = safetensors_io.read_json(folder / "scheduler" / "scheduler_config.json")
    assert config["prediction_type"] == "v_prediction"
    assert config["rescale_betas_zero_snr"] is True
    again = to_file(folder, tmp_path / "again.safetensors")
    assert single_files.contents(again) == single_files.contents(file)


def test_old_names_in_a_folder_or_a_file_are_read(small, tokenizer, tmp_path):
    """Of the VAE's attention, and of a text encoder without its module's name."""
    file, folder = small["sd15"]
    copy = shutil.copytree(folder, tmp_path / "copy")
    vae = copy / "vae" / "diffusion_pytorch_model.safetensors"
    arrays = arrays_of(vae)
    arrays = {safetensors_io.old_name(n): a for n, a in arrays.items()}
    single_files.write(vae, arrays)
    text = copy / "text_encoder" / "model.safetensors"
    arrays = {n.removeprefix("text_model."): a for n, a in arrays_of(text).items()}
    single_files.write(text, arrays)
    again = to_file(copy, tmp_path / "again.safetensors")
    assert single_files.contents(again) == single_files.contents(file)

    arrays = {n.replace(".text_model.", "."): a for n, a in arrays_of(file).items()}
    old = single_files.write(tmp_path / "old.safetensors", arrays)
    out = to_folder(old, tmp_path / "out", tokenizer)
    assert single_files.contents(out) == single_files.contents(folder)


def arrays_of(file):
    return {
        name: safetensors_io.read_tensor(name, entry, only_floats=False)
        for name, entry in safetensors_io.read_header(file).items()
    }


# --- what a file may hold -------------------------------------------------------------


def test_ema_weights_are_taken_only_if_asked_for(small, tokenizer, tmp_path, caplog):
    plain = single_files.small_tensors("sd15")
    averages = {
        "model_ema." + "".join(name.split(".")[1:]): array + array
        for name, array in plain.items()
        if name.startswith(UNET)
    }
    file = single_files.write_small(
        tmp_path / "ema.safetensors",
        "sd15",
        **averages,
        **{"model_ema.decay": np.ones((), np.float32)},
    )
    logging.set_verbosity(logging.INFO)
    try:
        out = to_folder(file, tmp_path / "plain", tokenizer)
    finally:
        logging.set_verbosity(logging.WARNING)
    assert sum("--ema takes them" in line for line in caplog.messages) == 1
    first = small["sd15"][1]
    assert single_files.contents(out) == single_files.contents(first)
    out = to_folder(file, tmp_path / "ema", tokenizer, "--ema")
    unet, before = (arrays_of(f / UNET_FILE) for f in (out, first))
    for name, array in unet.items():
        np.testing.assert_array_equal(array, before[name] + before[name])
    assert single_files.contents(out / "vae") == single_files.contents(first / "vae")
    refuse("--ema: .* holds no EMA weights", small["sd15"][0], tmp_path, "--ema")
    averages.popitem()
    file = single_files.write_small(tmp_path / "part.safetensors", "sd15", **averages)
    refuse("--ema: .* has no model_ema.diffusion_model", file, tmp_path, "--ema")


def test_leftovers_of_training_are_ignored(small, tokenizer, tmp_path):
    one = np.ones(1, np.float32)
    names = ("alphas_cumprod", "betas", "sqrt_one_minus_alphas_cumprod", "logvar")
    names += ("posterior_mean_coef1", "global_step", "denoiser.sigmas")
    names += ("cond_stage_model.transformer.text_projection.weight",)
    names += ("cond_stage_model.logit_scale", f"{VAE}loss.discriminator.main.0.weight")
    names += ("optimizer_states.0.state.0.exp_avg", "model_ema.num_updates")
    file = single_files.write_small(
        tmp_path / "a.safetensors", "sd15", **dict.fromkeys(names, one)
    )
    out = to_folder(file, tmp_path / "out", tokenizer)
    assert single_files.contents(out) == single_files.contents(small["sd15"][1])


@pytest.mark.parametrize(
    "name, header, flags, expected",
    [
        ("sd15", {}, [], "epsilon"),
        ("sd15", {"modelspec.prediction_type": "v"}, [], "v_prediction"),
        ("sdxl", {"modelspec.prediction_type": "v"}, [], "v_prediction"),
        ("sd21", {}, ["--prediction=epsilon"], "epsilon"),
        ("sd21", {"modelspec.prediction_type": "epsilon"}, [], "epsilon"),
        (
            "sd21",
            {"modelspec.architecture": "stable-diffusion-v2-768-v"},
            [],
            "v_prediction",
        ),
        (
            "sd21",
            {"modelspec.prediction_type": "epsilon"},
            ["--prediction=v_prediction"],
            "v_prediction",
        ),
    ],
)
def test_prediction_is_what_header_or_flag_say(
    name, header, flags, expected, tokenizer, tmp_path, caplog
):
    arrays = single_files.small_tensors(name)
    file = single_files.write(tmp_path / "a.safetensors", arrays, header)
    options = from_file.Options(
        prediction=flags[0].removeprefix("--prediction=") if flags else ""
    )
    model = from_file.SingleFile(file, options)
    assert model.configs["scheduler"]["prediction_type"] == expected
    assert ("decides" in caplog.text) == bool(header and flags)
    pixels = 512 if name == "sd15" else {"sdxl": 1024}.get(name)
    pixels = pixels or {"epsilon": 512, "v_prediction": 768}[expected]
    assert model.configs["vae"]["sample_size"] == pixels


@pytest.mark.parametrize("inner", ["vae", ""])
def test_a_vae_is_taken_from_elsewhere(inner, small, tokenizer, tmp_path):
    file, folder = small["sd15"]
    arrays = {n: a for n, a in arrays_of(file).items() if not n.startswith(VAE)}
    bare = single_files.write(
        tmp_path / "a.safetensors", arrays, single_files.header("sd15")
    )
    refuse("holds no VAE .*; name a folder or hub id .* --vae", bare, tmp_path)
    source = folder if inner else folder / "vae"
    for number, single in enumerate((bare, file)):  # the file's own gives way
        out = tmp_path / f"out{number}"
        to_folder(single, out, tokenizer, "--vae", source)
        assert single_files.contents(out) == single_files.contents(folder)
        stable_diffusion.load(out)
    xl = small["sdxl"][1]
    flags = ("--vae", xl)
    refuse(
        "--vae=.*: scaling_factor=0.13025 .* must be 0.18215", bare, tmp_path, *flags
    )
    refuse("--vae='nowhere'.*no such folder", bare, tmp_path, "--vae", "nowhere")


# --- as a model -----------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path, monkeypatch, tokenizer):
    """An empty folder of caches; the default tokenizer is the small files'."""
    monkeypatch.setenv("GIFT_JAX_CACHE", str(tmp_path / "cache"))
    defaults = dict.fromkeys(single_files.NAMES, str(tokenizer))
    monkeypatch.setattr(sources, "TOKENIZERS", defaults)
    monkeypatch.setattr(sources.hub, "fetch", lambda name, **how: tokenizer)
    return tmp_path / "cache" / "single_files"


def test_a_single_file_is_a_model_and_converted_once(
    small, cache, monkeypatch, tmp_path
):
    file, folder = small["sd15"]
    moved = shutil.copyfile(file, tmp_path / "moved.safetensors")
    first = load.model_folder(str(file))
    assert single_files.contents(first) == single_files.contents(folder)
    monkeypatch.setattr(from_file, "convert", None)  # a second time would fail
    assert load.model_folder(str(file)) == first == load.model_folder(str(moved))
    model = load.load_model(str(file))
    assert (model.path, model.image_size) == (first, 64)
    assert load.cpu_devices_to_draw(str(file)) > 0


@pytest.mark.parametrize("name", single_files.NAMES)
def test_pytorch_reads_a_file_as_the_cache_has_it(small, cache, capsys, name):
    """By diffusers' own conversion, without the network."""
    pytest.importorskip("diffusers")
    argv = ["verify", f"--model={small[name][0]}", "--no-picture"]
    assert convert.main(argv) == 0
    line, count = capsys.readouterr().out, 4 if name == "sdxl" else 3
    assert line.startswith(f"verified: {count} components load in diffusers")
    assert line.endswith("; no picture: --no-picture\n")


def test_another_content_is_another_model(small, cache, tmp_path):
    file = tmp_path / "a.safetensors"
    shutil.copyfile(small["sd15"][0], file)
    first = load.model_folder(str(file))
    with file.open("r+b") as f:
        f.seek(-2, 2)
        f.write(b"\x01\x02")
    second = load.model_folder(str(file))
    assert first != second and first.is_dir() and second.is_dir()
    assert single_files.contents(first) != single_files.contents(second)


def test_a_conversion_that_stops_midway_leaves_nothing(small, cache, monkeypatch):
    file = small["sd15"][0]
    calls = []

    def write_two(*args):
        calls.append(args)
        if len(calls) > 1:
            raise KeyboardInterrupt
        return safetensors_io.write_file(*args)

    with monkeypatch.context() as patch:
        module = type("Module", (), vars(safetensors_io) | {"write_file": write_two})
        patch.setattr(from_file, "safetensors_io", module)
        with pytest.raises(KeyboardInterrupt):
            load.model_folder(str(file))
    assert len(calls) == 2
    assert not [p for p in cache.iterdir() if p.is_dir()]
    assert load.model_folder(str(file)).is_dir()


# --- mistakes -------------------------------------------------------------------------


def refuse(message, file, folder, *flags):
    """Asserts that converting a file is one line, and leaves nothing."""
    out = folder / "refused"
    argv = ["from-single-file", file, "--out", out, *flags]
    with pytest.raises(UserError, match=message) as caught:
        convert.main([str(arg) for arg in argv])
    assert "\n" not in str(caught.value)
    assert not out.exists()


ONE = np.ones((1, 1), np.float16)


@pytest.mark.parametrize(
    "names, message",
    [
        (["lora_unet_down_blocks_0.lora_down.weight"], "seems to be a LoRA.*adapters"),
        (["unet.down.0.to_q.lora_A.weight"], "seems to be a LoRA"),
        (["double_blocks.0.img_attn.proj.weight"], "seems to be a Flux"),
        ([f"{UNET}joint_blocks.0.x.weight"], "seems to be a Stable Diffusion 3"),
        (["control_model.input_blocks.0.0.weight"], "seems to be a ControlNet"),
        (["encoder.down.0.block.0.conv1.weight"], "seems to be a VAE alone"),
        ([f"{VAE}decoder.up.0.block.0.conv1.weight"], "seems to be a VAE alone"),
        (["down_blocks.0.resnets.0.conv1.weight"], "by diffusers' names"),
        (["text_model.final_layer_norm.weight"], "a text encoder alone"),
        (["emb_params"], "a textual inversion"),
        (["edm_mean", f"{UNET}out.0.bias"], "EDM's noise"),
        (["some.other.weight"], r"holds no UNet .* but some\.other\.weight"),
        ([f"{UNET}out.0.bias"], "a UNet without its text encoders"),
        (
            [f"{UNET}out.0.bias", "conditioner.embedders.0.model.ln_final.bias"],
            "seems to be the refiner",
        ),
        ([], "holds no UNet"),
    ],
)
def test_other_files_are_named(names, message, tmp_path):
    arrays = dict.fromkeys(names, ONE)
    file = single_files.write(tmp_path / "a.safetensors", arrays, {"format": "pt"})
    refuse(message, file, tmp_path)


@pytest.mark.parametrize(
    "name, changes, message",
    [
        ("sd15", {"wrong.b": ONE, "wrong.a": ONE}, r"wrong\.a and 1 others are no"),
        ("sd15", {f"{UNET}out.0.bias": None}, "misses .*out.0.bias and 0 other"),
        ("sd15", {f"{UNET}input_blocks.0.0.weight": None}, "misses .*input_blocks.0.0"),
        ("sd15", {f"{UNET}out.0.bias": ONE}, r"out.0.bias has shape \[1, 1\].*\[32\]"),
        (
            "sd15",
            {f"{UNET}input_blocks.0.0.weight": np.ones((32, 9, 3, 3), np.float16)},
            r"has 9 input channels \(inpainting\); must be 4",
        ),
        (
            "sd15",
            {f"{UNET}out.0.bias": np.ones(32, np.int8)},
            "has dtype I8; must be one of F32, F16, BF16",
        ),
        (
            "sdxl",
            {f"{UNET}input_blocks.3.1.transformer_blocks.0.norm1.bias": None},
            "misses",
        ),
        (
            "sdxl",  # another depth in the second half, as in distilled models
            {f"{UNET}output_blocks.0.1.transformer_blocks.2.norm1.bias": ONE},
            "output_blocks.0.1.transformer_blocks.2.norm1.bias and 0 others are no",
        ),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(name, changes, message, tmp_path):
    file = single_files.write_small(tmp_path / "a.safetensors", name, **changes)
    refuse(message, file, tmp_path)


@pytest.mark.parametrize(
    "name, header, message",
    [
        ("sd21", {}, "does not say what its UNet predicts.*--prediction=epsilon or"),
        ("sd15", {"modelspec.prediction_type": "x0"}, "'x0'; must be epsilon or v"),
        (
            "sd21",
            {
                "modelspec.prediction_type": "epsilon",
                "modelspec.architecture": "stable-diffusion-v2-768-v",
            },
            "contradicts itself",
        ),
        (
            "sd15",
            {"modelspec.architecture": "stable-diffusion-xl-v1-base"},
            "'stable-diffusion-xl-v1-base', but its tensors are .* 1.x",
        ),
    ],
)
def test_a_header_that_contradicts_is_named(name, header, message, tmp_path):
    arrays = single_files.small_tensors(name)
    file = single_files.write(tmp_path / "a.safetensors", arrays, header)
    refuse(message, file, tmp_path)


def test_files_and_flags_that_are_wrong_are_one_line(
    small, tokenizer, tmp_path, monkeypatch
):
    file, folder = small["sd15"]
    short = tmp_path / "short.safetensors"
    short.write_bytes(file.read_bytes()[:-1])
    refuse("truncated", short, tmp_path)
    refuse("no such file", tmp_path / "none.safetensors", tmp_path)
    refuse("out of reach.* by --tokenizer", file, tmp_path)
    other = tmp_path / "other"
    single_files.random_weights.write_tokenizer(other / "tokenizer", 515, 16)
    flags = ("--tokenizer", other)
    refuse("has 515 words, but .* has vectors for 514", file, tmp_path, *flags)
    refuse("invalid choice", file, tmp_path, "--prediction=x0")
    with pytest.raises(UserError, match="--out=.* exists"):
        to_folder(file, folder, tokenizer)
    assert single_files.contents(folder)


@pytest.mark.parametrize(
    "component, change, message",
    [
        ("unet", {"attention_head_dim": 4}, "attention_head_dim=4.*take 8"),
        ("unet", {"flip_sin_to_cos": False}, "flip_sin_to_cos=False.*take True"),
        ("unet", {"layers_per_block": [1, 2]}, "layers_per_block=.*must be a whole"),
        ("unet", {"down_block_types": ["DownBlock2D"]}, "1 entries.*must be as many"),
        ("unet", {"cross_attention_dim": 32}, "has shape .* config.json says"),
        ("unet", {"in_channels": 9}, "in_channels=9; must be 4"),
        ("vae", {"scaling_factor": 0.5}, "scaling_factor=0.5.*take 0.18215"),
        ("text_encoder", {"num_hidden_layers": 1}, "unexpected tensors"),
        ("text_encoder", {"num_hidden_layers": 3}, "missing tensors"),
        ("text_encoder", {"vocab_size": 49409}, "vocab_size=49409"),
        ("text_encoder", {"layer_norm_eps": 1e-6}, "layer_norm_eps=1e-06.*take 1e-05"),
        ("scheduler", {"beta_end": 0.02}, "beta_end=0.02.*take 0.012"),
        ("scheduler", {"prediction_type": "sample"}, "prediction_type='sample'"),
    ],
)
def test_what_a_single_file_cannot_say_is_refused(
    component, change, message, small, tmp_path
):
    copy = shutil.copytree(small["sd15"][1], tmp_path / "copy")
    name = "scheduler_config" if component == "scheduler" else "config"
    config = copy / component / f"{name}.json"
    config.write_text(json.dumps(safetensors_io.read_json(config) | change))
    out = tmp_path / "a.safetensors"
    with pytest.raises(UserError, match=message) as caught:
        to_file(copy, out)
    assert "\n" not in str(caught.value) and not out.exists()


def test_folders_and_names_that_are_wrong_are_one_line(small, tmp_path):
    folder = small["sd15"][1]
    with pytest.raises(UserError, match=r"must end in \.safetensors"):
        to_file(folder, tmp_path / "a.ckpt")
    with pytest.raises(UserError, match="no such folder"):
        to_file(tmp_path / "none", tmp_path / "a.safetensors")
    copy = shutil.copytree(folder, tmp_path / "copy")
    index = safetensors_io.read_json(copy / "model_index.json")
    index["unet"] = ["diffusers", "FluxTransformer2DModel"]
    (copy / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="unet is FluxTransformer2DModel; must be UNet"):
        to_file(copy, tmp_path / "a.safetensors")
