# SPDX-License-Identifier: Apache-2.0
"""The train command line on the tiny model: a run's folder, resuming, mistakes."""

import json
import pathlib
import shutil

import full_models
import numpy as np
import pytest
import safetensors.numpy
from PIL import Image
from tiny_model import write_pictures

import gift_jax
from gift_jax import convert, train
from gift_jax.models import safetensors_io, weights
from gift_jax.models.sd import random_weights, stable_diffusion
from gift_jax.runtime import processes
from gift_jax.runtime.config import load_config
from gift_jax.runtime.errors import StoppedBySignal, UserError
from gift_jax.training import checkpoint

GIFT = pathlib.Path(gift_jax.__file__).parents[1] / "configs" / "emoji_gift.py"


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """A folder of four pictures of the tiny model's size."""
    return write_pictures(tmp_path_factory.mktemp("pictures"), 4, 3)


@pytest.fixture(autouse=True)
def emoji_cache(monkeypatch, pytestconfig):
    """The embedded pictures, prepared once and kept between test runs."""
    monkeypatch.setenv("GIFT_JAX_CACHE", str(pytestconfig.cache.mkdir("emoji")))


@pytest.fixture
def main(tiny_folder, pictures):
    """(workdir, flags) -> the run's folder, on the pictures and the tiny model."""

    def call(workdir, *flags, config=f"{GIFT}:smoke", names=False):
        argv = [f"--config={config}", f"--workdir={workdir}"]
        argv += [f"--config.model={tiny_folder}"]
        if not names:
            for group in ("harmful", "safe"):
                argv += [
                    f"--config.{group}.names=()",
                    f"--config.{group}.folder={pictures}",
                    f"--config.{group}.prompt=a {group} thing",
                ]
        assert train.main([*argv, *flags]) == 0
        return workdir

    return call


def unet_tensors(folder):
    return safetensors.numpy.load_file(
        folder / "unet" / "diffusion_pytorch_model.safetensors"
    )


def changed_tensors(base, folder):
    old, new = unet_tensors(base), unet_tensors(folder)
    assert set(old) == set(new)
    return {name for name in old if old[name].tobytes() != new[name].tobytes()}


def files(folder):
    return {p.relative_to(folder) for p in folder.rglob("*") if p.is_file()}


def logged(workdir):
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [
        {k: v for k, v in json.loads(line).items() if not k.startswith("time/")}
        for line in lines
    ]


# --- whole runs -----------------------------------------------------------------------


def test_smoke_config_trains_and_fills_the_runs_folder(main, tiny_folder, tmp_path):
    names = ["bomb", "pill"]
    flag = f"--config.harmful.names={','.join(names)}"
    run = main(tmp_path / "run", flag, names=True)
    assert json.loads((run / "config.json").read_text())["harmful"]["names"] == names
    assert [line["step"] for line in logged(run)] == [1, 2]
    assert {"lower/loss", "upper/loss", "lower/grad_norm"} <= set(logged(run)[0])
    each = {key for line in logged(run) for key in line if key.startswith("concept/")}
    assert each == {"concept/bomb", "concept/pill"}
    assert (run / "checkpoints" / "2").is_dir()
    assert list(run.glob("events.out.tfevents.*"))
    for name in ("before.png", "after.png"):
        with Image.open(run / "samples" / name) as image:
            assert image.size[0] > 16
    stable_diffusion.load(run / "export")


@pytest.mark.parametrize(
    "name",
    [
        "sd15_style",
        pytest.param("sd15_object", marks=pytest.mark.slow),
        pytest.param("sd15_nsfw", marks=pytest.mark.slow),
    ],
)
def test_sd15_config_trains_on_what_the_model_draws(
    tiny_folder, tmp_path, monkeypatch, name
):
    monkeypatch.setenv("GIFT_JAX_CACHE", str(tmp_path / "cache"))
    argv = [f"--config={GIFT.with_name(name + '.py')}:smoke"]
    argv += [f"--config.model={tiny_folder}"]
    argv += ["--config.harmful.batch=2", "--config.safe.batch=2"]  # two devices
    argv += ["--config.samples.num=0", f"--workdir={tmp_path / 'run'}"]
    assert train.main(argv) == 0
    assert changed_tensors(tiny_folder, tmp_path / "run" / "export")
    assert len(list((tmp_path / "cache" / "generated").rglob("*.png"))) == 2


@pytest.mark.slow
def test_a_model_as_sd2_is_published_trains_and_exports(main, tmp_path):
    configs = full_models.configs("small-sd21")
    base = tmp_path / "sd21"
    random_weights.write(base, configs, "float16", shard_mib=1)
    assert len(list((base / "unet").glob("*.safetensors"))) > 1
    flags = (f"--config.model={base}", "--config.resolution=64")
    run = main(tmp_path / "run", *flags, "--config.samples.num=0")
    differ = set()
    for source in (p for p in base.rglob("*") if p.is_file()):
        exported = run / "export" / source.relative_to(base)
        same = exported.read_bytes() == source.read_bytes()
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


def test_export_differs_from_the_base_in_the_trained_tensors_only(
    main, tiny_folder, tmp_path
):
    run = main(tmp_path / "run", "--config.samples.num=0")
    changed = changed_tensors(tiny_folder, run / "export")
    assert changed == {
        name for name in unet_tensors(tiny_folder) if ".attn2.to_" in name
    }
    card = pathlib.Path("README.md")
    assert files(run / "export") == files(tiny_folder) | {card}
    told = (run / "export" / card).read_text()
    assert weights.content_hash(tiny_folder) in told and "After step 2, of" in told
    assert str(tiny_folder.parent) not in told and str(tmp_path) not in told
    for file in files(tiny_folder):
        if file.parts[0] != "unet" or file.suffix != ".safetensors":
            same = (run / "export" / file).read_bytes() == (
                tiny_folder / file
            ).read_bytes()
            assert same, file


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param(("--config.gift.gradient=unrolled",), marks=pytest.mark.slow),
        ("--config.gift.gradient=joint", "--config.gift.distance=mmd"),
    ],
)
def test_resumed_run_exports_what_a_straight_one_does(
    main, tmp_path, monkeypatch, flags
):
    flags = (*flags, "--config.samples.num=0")
    straight = main(tmp_path / "a", *flags)
    # Fewer steps would be another schedule, and so a program that may round otherwise.
    with monkeypatch.context() as stopped:
        stopped.setattr(processes, "preempted", lambda done: done == 1)
        with pytest.raises(StoppedBySignal):
            main(tmp_path / "b", *flags)
    step, halfway = checkpoint.read_params(tmp_path / "b" / "checkpoints")
    assert step == 1 and not (tmp_path / "b" / "export").exists()
    resumed = main(tmp_path / "b", *flags)
    step, params = checkpoint.read_params(resumed / "checkpoints")
    assert step == 2
    assert any((params[path] != halfway[path]).any() for path in params)
    assert not changed_tensors(straight / "export", resumed / "export")
    assert logged(straight) == logged(resumed)


def test_finished_run_is_left_as_it_is(main, tmp_path):
    flags = ("--config.samples.num=0", "--config.steps=1")
    run = main(tmp_path, *flags)
    before = (run / "metrics.jsonl").read_bytes(), unet_tensors(run / "export")
    main(tmp_path, *flags)
    assert (run / "metrics.jsonl").read_bytes() == before[0]
    assert not changed_tensors(run / "export", run / "export")
    for name, tensor in unet_tensors(run / "export").items():
        np.testing.assert_array_equal(tensor, before[1][name])


def test_half_precision_leaves_the_trained_weights_whole(main, tiny_folder, tmp_path):
    flags = ("--config.compute_dtype=bfloat16", "--config.samples.num=0")
    flags += ("--config.steps=1",)
    still = main(
        tmp_path / "still", *flags, "--config.lower.lr=0", "--config.upper.lr=0"
    )
    assert not changed_tensors(tiny_folder, still / "export")
    rates = ("--config.lower.lr=2e-4", "--config.upper.lr=2e-4")
    moved = main(tmp_path / "moved", *flags, *rates)
    old, new = unet_tensors(tiny_folder), unet_tensors(moved / "export")
    steps = [
        np.abs(new[name] - old[name]).max()
        for name in changed_tensors(tiny_folder, moved / "export")
    ]
    assert steps and max(steps) < 1e-3  # two AdamW updates of 2e-4


def test_captions_and_the_models_own_pictures_train(
    main, tiny_folder, pictures, tmp_path, monkeypatch
):
    monkeypatch.setenv("GIFT_JAX_CACHE", str(tmp_path / "cache"))
    captioned = tmp_path / "captioned"
    shutil.copytree(pictures, captioned / "train")
    lines = (f"train/{i}.png,thing {i}\n" for i in range(4))
    (captioned / "metadata.csv").write_text("file_name,text\n" + "".join(lines))
    flags = [f"--config.harmful.folder={captioned}", "--config.harmful.prompt="]
    flags += ["--config.safe.folder=", "--config.safe.num_generated=3"]
    flags += ["--config.safe.generation.steps=2", "--config.samples.num=0"]
    run = main(tmp_path / "run", *flags, "--config.harmful.crop=random")
    assert changed_tensors(tiny_folder, run / "export")
    assert len(list((tmp_path / "cache" / "generated").rglob("*.png"))) == 3


def test_preserving_the_model_starts_from_what_it_predicts(main, tiny_folder, tmp_path):
    flags = ["--config.samples.num=0", "--config.post_finetune.steps=1"]
    flags += ["--config.steps=1", "--config.log_every=1"]
    lower = {}
    for preserve in ("data", "model"):
        chosen = f"--config.gift.preserve={preserve}"
        run = main(tmp_path / preserve, *flags, chosen)
        logs = run / "metrics.jsonl", run / "post_finetune" / "metrics.jsonl"
        lower[preserve] = [json.loads(log.read_text())["lower/loss"] for log in logs]
        assert changed_tensors(tiny_folder, run / "export")
    assert lower["model"][0] < 1e-9 and lower["data"][0] > 0.1
    assert 1e-9 < lower["model"][1] < lower["data"][1]  # after one upper update


@pytest.mark.parametrize(
    "method, flags",
    [
        ("imma", ["imma.lower=lora", "post_finetune.steps=2"]),
        pytest.param(
            "imma",
            ["imma.lower=dreambooth", "trainable=attention"],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_imma_exports_its_attention_alone(main, tiny_folder, tmp_path, method, flags):
    flags = [f"--config.{flag}" for flag in [f"method={method}", *flags]]
    run = main(tmp_path / "run", *flags, "--config.samples.num=0")
    changed = changed_tensors(tiny_folder, run / "export")
    wanted = ".attn" if "trainable" in flags[-1] else ".attn2."
    assert changed and all(wanted in name for name in changed)
    last = run / "post_finetune" if "post" in flags[-1] else run
    assert (last / "checkpoints" / "2").is_dir()
    out = tmp_path / "converted"
    argv = [f"--checkpoint={last / 'checkpoints'}", f"--out={out}"]
    convert.main(["to-diffusers", *argv])
    assert not changed_tensors(run / "export", out)


@pytest.mark.parametrize("method", ["esd", "uce"])
def test_erasure_changes_cross_attention(main, tiny_folder, tmp_path, method):
    config = f"{GIFT.with_name('emoji_baselines.py')}:smoke"
    flags = [f"--config.method={method}", "--config.samples.num=0"]
    run = main(tmp_path / "run", *flags, config=config)
    changed = changed_tensors(tiny_folder, run / "export")
    wanted = (".attn2.to_k.", ".attn2.to_v.") if method == "uce" else (".attn2.",)
    assert changed and all(any(w in name for w in wanted) for name in changed)
    assert (run / "metrics.jsonl").exists() == (method == "esd")
    if method == "esd":  # what one method has made, another starts from
        flags = [f"--config.model={run / 'export'}", "--config.samples.num=0"]
        both = main(tmp_path / "both", *flags)
        config = json.loads((both / "config.json").read_text())
        assert config["base_sha256"] == weights.content_hash(run / "export")
        again = changed_tensors(run / "export", both / "export")
        assert again and all(".attn2." in name for name in again)


@pytest.mark.parametrize("name", ["emoji_baselines", "sd15_baselines"])
def test_every_baseline_passes_the_check(name):
    path = GIFT.with_name(f"{name}.py")
    variants = ["esd", "uce", "imma", "imma_lora", "maximize_prior", "smoke"]
    methods = set()
    for variant in variants:
        cfg = load_config(f"{path}:{variant}")
        train.check(cfg)
        methods.add(cfg.method)
    assert methods == {"esd", "uce", "imma", "maximize_prior"}


def test_zero_steps_export_the_base(main, tiny_folder, tmp_path):
    run = main(tmp_path, "--config.steps=0", "--config.samples.num=0")
    assert not changed_tensors(tiny_folder, run / "export")


# --- mistakes -------------------------------------------------------------------------


def mistake(main, tmp_path, *flags, match, **kwargs):
    with pytest.raises(UserError, match=match) as caught:
        main(tmp_path / "run", *flags, **kwargs)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()  # or a corrected run could not use it


@pytest.mark.parametrize(
    "flag, message",
    [
        ("stepz=3", "config.stepz is no field.*did you mean config.steps"),
        ("method=gfit", "config.method='gfit' is not one of.*gift"),
        ("trainable=cross", "config.trainable='cross' is not one of.*cross_attention"),
        ("compute_dtype=float8", "config.compute_dtype='float8' is not one of"),
        ("steps=-1", "config.steps=-1 must be at least 0"),
        ("seed=-1", "config.seed=-1 must be"),
        ("keep=0", "config.keep=0 must be at least 1"),
        ("log_every=0", "config.log_every=0 must be at least 1"),
        ("cpu_devices=-1", "config.cpu_devices=-1 must be at least 0"),
        ("gift.gradient=second_order", "config.gift.gradient='second_order' is not"),
        ("gift.bound=clip", "config.gift.bound='clip' is not one of"),
        ("gift.noise_target=own", "config.gift.noise_target='own' is not one of"),
        ("gift.distance=cosine", "config.gift.distance='cosine' is not one of"),
        ("gift.layers=norm", "config.gift.layers='norm' is not one of"),
        ("gift.layers=()", "config.gift.layers is empty"),
        ("gift.inner_steps=-1", "config.gift.inner_steps=-1 must be at least 0"),
        ("gift.outer_steps=0", "config.gift.outer_steps=0 must be at least 1"),
        ("gift.beta=-1", "config.gift.beta=-1.0 must be at least 0"),
        ("adversary.kinds=lora,pgd", "config.adversary.kinds='pgd' is not one of"),
        ("adversary.steps_max=0", "config.adversary.steps_max=0 must be at least 1"),
        ("adversary.steps_min=9", "config.adversary.steps_min=9 must be at most"),
        ("adversary.lr_min=0", "config.adversary.lr_min=0.0 must be at least"),
        ("adversary.horizon=-1", "config.adversary.horizon=-1 must be at least 0"),
        ("adversary.horizon=9", "config.adversary.horizon=9 is for kinds=full"),
        (
            "adversary.alpha=0",
            "config.adversary.alpha=0.0 must be above 0; try config.adversary.alpha=8",
        ),
        ("post_finetune.steps=-1", "config.post_finetune.steps=-1 must be at least"),
        ("gift.preserve=all", "config.gift.preserve='all' is not one of: data"),
        ("lower.schedule=linear", "config.lower.schedule='linear' is not one of"),
        ("upper.lr=-1", "config.upper.lr=-1.0 must be at least 0"),
        ("upper.lr=nan", "config.upper.lr=nan must be finite"),
        ("harmful.batch=0", "config.harmful.batch=0 must be at least 1"),
        (
            "safe.augmented_copies=0",
            "config.safe.augmented_copies=0 must be at least 1",
        ),
        ("safe.prompt_dropout=2", "config.safe.prompt_dropout=2.0 must be at most 1"),
        ("harmful.nonce_prompts=2", "config.harmful.nonce_prompts=2.0 must"),
        ("harmful.batch=3", "harmful.batch=3 must divide by 2 devices.*batch=2"),
        ("samples.num=-1", "config.samples.num=-1 must be at least 0"),
        ("samples.steps=0", "config.samples.steps=0 must be at least 1"),
        ("samples.batch=0", "config.samples.batch=0 must be at least 1"),
        ("samples.guidance=0", "config.samples.guidance=0.0 must be at least 1"),
        ("samples.prompts=()", "config.samples.prompts is empty"),
        ("model=nowhere", "nowhere.*no such folder"),
        ("safe.folder=nowhere", "config.safe.folder=nowhere is not a folder"),
        ("safe.prompt=", "config.safe.prompt is empty"),
        ("safe.names=cat face", "config.safe: give only one.*not names and folder"),
    ],
)
def test_mistake_is_named_before_anything_is_written(main, tmp_path, flag, message):
    flags = "--config.cpu_devices=2", f"--config.{flag}"
    mistake(main, tmp_path, *flags, match=message)


@pytest.mark.parametrize(
    "flag, message",
    [
        ("imma.lower=db", "config.imma.lower='db' is not one of: dreambooth, lora"),
        ("imma.bound=clip", "config.imma.bound='clip' is not one of"),
        ("imma.rank=0", "config.imma.rank=0 must be at least 1"),
        (
            "imma.alpha=0",
            "config.imma.alpha=0.0 must be above 0; try config.imma.alpha=4",
        ),
        ("imma.inner_steps=2", "steps=2 and outer_steps=3 share their pairs"),
    ],
)
def test_immas_mistake_is_named(main, tmp_path, flag, message):
    flags = ("--config.method=imma", "--config.imma.outer_steps=3")
    mistake(main, tmp_path, *flags, f"--config.{flag}", match=message)


@pytest.mark.parametrize(
    "method, flag, message",
    [
        ("esd", "esd.source=old", "config.esd.source='old' is not one of: frozen"),
        ("esd", "esd.timestep=any", "config.esd.timestep='any' is not one of"),
        ("esd", "esd.steps=0", "config.esd.steps=0 must be at least 1"),
        ("esd", "esd.guidance=0", "config.esd.guidance=0.0 must be at least 1"),
        ("uce", "uce.states=all", "config.uce.states='all' is not one of: last, tail"),
        (
            "uce",
            "uce.lamb=0",
            "config.uce.lamb=0.0 must be above 0; try config.uce.lamb=0.5",
        ),
        ("uce", "uce.guide={thing}", r"config.uce.guide='\{thing\}' may use only"),
    ],
)
def test_an_erasures_mistake_is_named(main, tmp_path, method, flag, message):
    flags = (f"--config.method={method}", f"--config.{flag}")
    mistake(main, tmp_path, *flags, match=message)


@pytest.mark.parametrize(
    "flag, message",
    [
        ("harmful.names=bom", "config.harmful.names: concept 'bom'.*mean 'bomb'"),
        ("safe.styles=notto", "config.safe.styles: style 'notto'.*'noto'"),
        ("safe.template={thing}", r"config.safe.template='\{thing\}' may use only"),
    ],
)
def test_what_is_not_in_the_data_is_named(main, tmp_path, flag, message):
    mistake(main, tmp_path, f"--config.{flag}", match=message, names=True)


def test_empty_or_unreadable_picture_folder_is_named(main, tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    flag = f"--config.harmful.folder={folder}"
    mistake(main, tmp_path, flag, match="config.harmful.folder=.* has no pictures")
    (folder / "a.png").write_bytes(b"no picture")
    mistake(main, tmp_path, flag, match="a.png cannot be read as a picture")


@pytest.mark.parametrize(
    "file, content, message",
    [
        ("model_index.json", None, "model_index.json: no such file"),
        ("model_index.json", b"{", "model_index.json: not valid JSON"),
        ("unet/config.json", None, "config.json: no such file"),
        ("unet/diffusion_pytorch_model.safetensors", b"x", "truncated or not"),
        ("vae/diffusion_pytorch_model.safetensors", None, "no diffusion_pytorch_model"),
        ("scheduler/scheduler_config.json", b"[", "scheduler_config.json: not valid"),
        ("tokenizer/vocab.json", None, "vocab.json: no such file"),
    ],
)
def test_malformed_model_folder_is_named(
    main, tiny_folder, tmp_path, file, content, message
):
    model = tmp_path / "model"
    shutil.copytree(tiny_folder, model)
    (model / file).unlink()
    if content is not None:
        (model / file).write_bytes(content)
    mistake(main, tmp_path, f"--config.model={model}", match=message)


def test_workdir_of_another_run_is_refused(main, tiny_folder, tmp_path):
    flags = ("--config.steps=0", "--config.samples.num=0")
    main(tmp_path, *flags)
    with pytest.raises(UserError, match=r"another config \(upper.lr was .*, is 0.5\)"):
        main(tmp_path, *flags, "--config.upper.lr=0.5")
    model = tmp_path / "model"
    shutil.copytree(tiny_folder, model)
    file = model / "unet" / "diffusion_pytorch_model.safetensors"
    entry = safetensors_io.read_header(file)["conv_in.bias"]
    with file.open("r+b") as f:
        f.seek(entry.begin)
        f.write(b"\0\0\0\0")
    with pytest.raises(UserError, match="another config.*base_sha256 was"):
        main(tmp_path, *flags, f"--config.model={model}")


def test_a_batch_that_does_not_divide_goes_to_fewer_devices(main, tmp_path):
    run = main(tmp_path / "run", "--config.harmful.batch=3", "--config.samples.num=0")
    assert (run / "export" / "model_index.json").is_file()
    assert json.loads((run / "config.json").read_text())["cpu_devices"] == 0
