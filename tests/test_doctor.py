# SPDX-License-Identifier: Apache-2.0
"""The command that says what is installed, what fits, and what is wrong."""

import json
import os
import subprocess
import sys
import time
import types

import jax
import jax.numpy as jnp
import pytest

from gift_jax import train
from gift_jax.compile import tpu
from gift_jax.doctor import __main__ as doctor
from gift_jax.doctor import fits, machine, problems
from gift_jax.models.flux import architectures as flux_architectures
from gift_jax.models.kinds import KINDS
from gift_jax.models.load import EMBEDDED
from gift_jax.models.mmdit import architectures as mmdit_architectures
from gift_jax.models.params import parameter_shapes
from gift_jax.models.sd import architectures
from gift_jax.models.trainable import select_trainable
from gift_jax.runtime.config import load_config
from gift_jax.runtime.errors import UserError
from gift_jax.training import sharding

SECTIONS = ("versions", "machine", "devices", "environment", "caches", "what fits")
GPU = {"platform": "gpu", "kind": "NVIDIA H200", "count": 1}


@pytest.fixture(autouse=True)
def large_machine(monkeypatch, tmp_path):
    """A machine without problems, whatever runs on this one."""
    monkeypatch.setattr(machine, "_memory", lambda: 64 * 10**9)
    monkeypatch.setattr(machine, "_free_memory", lambda: 32 * 10**9)
    monkeypatch.setattr(machine, "_free_disk", lambda folder: 100 * 10**9)
    monkeypatch.setattr(machine, "nvidia_driver", lambda: "none")
    monkeypatch.setenv("GIFT_JAX_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def run(capsys):
    """Runs the command; returns (exit code, the lines of its output)."""

    def run(*argv):
        code = doctor.main(list(argv))
        return code, capsys.readouterr().out.splitlines()

    return run


def problems_of(lines):
    return [line.strip() for line in lines[lines.index("problems") + 1 :]]


# --- the report -----------------------------------------------------------------------


def test_every_section_is_there_and_nothing_is_wrong(run):
    code, lines = run()
    assert [line for line in lines if line[0] != " "] == [*SECTIONS, "problems"]
    assert code == 0 and problems_of(lines) == ["none"]
    text = "\n".join(lines)
    assert f"jax {jax.__version__}, jaxlib " in text
    assert f"{jax.local_device_count()} x cpu" in text
    for size in fits.SIZES.values():
        assert sum(size.title in line for line in lines) >= len(fits.OPTIMIZERS)
    assert "unknown" not in text


def test_json_says_the_same(run, monkeypatch, tmp_path):
    report = doctor.examine()
    monkeypatch.setattr(doctor, "examine", lambda: report)
    _, alone = run("--json")
    code, beside = run("--json", str(tmp_path / "report.json"))
    assert json.loads("\n".join(alone)) == report
    assert json.loads((tmp_path / "report.json").read_text()) == report
    assert code == 0 and "\n".join(beside) == doctor.text(report)
    assert report["problems"] == []
    assert len(report["fits"]) == len(fits.SIZES) * len(fits.OPTIMIZERS)


def test_json_file_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"--json=.*/a.json: .*; name another file"):
        doctor.main(["--json", str(tmp_path / "file" / "a.json")])


def test_only_variables_of_jax_and_gift_jax_are_shown(run, monkeypatch):
    monkeypatch.setenv("JAX_TRACEBACK_FILTERING", "off")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("HOME", "/somewhere/alice")
    monkeypatch.setenv("GIFT_JAX_CACHE", "/somewhere/alice/cache")
    text = "\n".join(run()[1])
    assert "JAX_TRACEBACK_FILTERING" in text and "~/cache" in text
    assert "secret" not in text and "alice" not in text and "HF_TOKEN" not in text


def test_sizes_of_the_caches_are_by_kind(run, tmp_path):
    for folder, size in (
        ("xla", 10),
        ("generated/a", 20),
        ("single_files", 5),
        (".", 1),
    ):
        path = tmp_path / "cache" / folder
        path.mkdir(parents=True, exist_ok=True)
        (path / "file").write_bytes(b"0" * size)
    sizes = doctor.examine()["caches"]["bytes"]
    assert list(sizes.values()) == [10, 20, 5, 1]
    assert set(machine.CACHES.values()) < sizes.keys()


def test_models_in_the_cache_of_the_hub_are_listed(monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    whole, half, *others = architectures.IDS
    flow, *more = (*mmdit_architectures.IDS, *flux_architectures.MODELS)
    parts = "vae", "text_encoder"
    every = "transformer", *parts, "text_encoder_2", "text_encoder_3"
    for name, kinds in (
        (whole, ("unet", *parts)),
        (half, ("unet",)),
        (flow, every),
        (more[0], every[:-1]),
    ):
        snapshot = tmp_path / f"models--{name.replace('/', '--')}" / "snapshots" / "0"
        for kind in kinds:
            (snapshot / kind).mkdir(parents=True)
            (snapshot / kind / "model.safetensors").touch()
    states = doctor.examine()["caches"]["hub_models"]
    expected = {whole: "yes", half: "incomplete"} | dict.fromkeys(others, "no")
    expected |= dict.fromkeys(more, "no") | {flow: "yes", more[0]: "incomplete"}
    assert states == expected


def test_it_starts_fast_and_imports_no_pytorch():
    code = (
        "import sys; from gift_jax.doctor.__main__ import main; main(['--json']);"
        "assert not {'torch', 'transformers', 'orbax'} & sys.modules.keys()"
    )
    before = os.times()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    after = os.times()
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["libraries"]["jax"] == jax.__version__
    assert after.children_user - before.children_user < 3  # seconds of processor time


# --- problems -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "driver, extra", [("580.65.06", "cuda13"), ("535.129.03", "cuda12")]
)
def test_driver_without_gpu_in_jax_names_the_extra(run, monkeypatch, driver, extra):
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.setattr(machine, "nvidia_driver", lambda: driver)
    code, lines = run()
    (line,) = problems_of(lines)
    assert code == 1
    assert driver in line and f"pip install -U '.[{extra}]'" in line


def test_driver_with_cpu_chosen_names_the_variable(run, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setattr(machine, "nvidia_driver", lambda: "580.65.06")
    code, lines = run()
    (line,) = problems_of(lines)
    assert code == 1 and "JAX_PLATFORMS=cpu" in line and "unset" in line


def test_unwritable_cache_names_the_variable(run, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("GIFT_JAX_CACHE", str(tmp_path / "file" / "cache"))
    code, lines = run()
    (line,) = problems_of(lines)
    assert code == 1 and "cannot be written" in line and "set GIFT_JAX_CACHE" in line


def test_little_memory_is_a_problem(run, monkeypatch):
    monkeypatch.setattr(machine, "_free_memory", lambda: 10**9)
    code, lines = run()
    (line,) = problems_of(lines)
    assert code == 1 and line.startswith("1.0 GB of memory are free")
    monkeypatch.setattr(machine, "_memory", lambda: 2 * 10**9)
    code, lines = run()
    assert code == 1 and "no published model fits" in problems_of(lines)[1]


def test_small_accelerator_says_how_many_it_takes(run, monkeypatch):
    devices = [GPU | {"memory_bytes": 12 * 10**9}]
    monkeypatch.setattr(machine, "_jax_devices", lambda: devices)
    code, lines = run()
    assert code == 0
    assert any("1 x gpu, NVIDIA H200" in line and "12.00 GB" in line for line in lines)
    table = [line for line in lines if line.startswith("  S") and "gift" in line]
    assert table[0].endswith("yes, 8.81 left")
    assert table[1].endswith("no; on 2, with mesh.fsdp and shard_frozen")
    devices[0]["memory_bytes"] = None
    assert "does not say" in "\n".join(run()[1])


def test_jax_that_does_not_start_is_a_problem_and_no_crash(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "jax", None)
    monkeypatch.setenv("JAX_PLATFORMS", "tpu")
    code, lines = run()
    (line,) = problems_of(lines)
    assert code == 1 and line.startswith("JAX has no devices: unknown (")
    assert "unset JAX_PLATFORMS" in line


def test_jax_that_waits_forever_is_a_problem(run, monkeypatch):
    fake = types.SimpleNamespace(local_devices=lambda: time.sleep(60))
    monkeypatch.setitem(sys.modules, "jax", fake)
    monkeypatch.setattr(machine, "_START_S", 0.1)
    code, lines = run()
    assert code == 1 and "no devices after 0.1 s" in problems_of(lines)[0]


def test_missing_library_is_a_problem(run, monkeypatch):
    monkeypatch.setattr(machine, "REQUIRED", ("jax", "jaxlib", "no-such-library"))
    code, lines = run()
    assert code == 1 and problems_of(lines)[0].startswith("no-such-library not inst")


@pytest.mark.parametrize(
    "text, version",
    [
        ("UNIX x86_64 Kernel Module  535.129.03  Thu Oct 19", "535.129.03"),
        ("UNIX Open Kernel Module for x86_64  580.65.06  Release", "580.65.06"),
    ],
)
def test_version_of_a_driver(text, version):
    assert machine.driver_version(f"NVRM version: NVIDIA {text}") == version


@pytest.mark.parametrize(
    "name", ["_processor", "_memory", "_free_disk", "_try_to_write"]
)
@pytest.mark.parametrize("error", [OSError("gone"), KeyError("x"), ValueError()])
def test_what_cannot_be_found_out_is_unknown(run, monkeypatch, name, error):
    def fail(*_):
        raise error

    monkeypatch.setattr(machine, name, fail)
    code, lines = run()
    why = type(error).__name__ + (f": {error}" if str(error) else "")
    assert f"unknown ({why})" in "\n".join(lines)
    assert code == (name == "_try_to_write")


# --- what fits ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shapes():
    """{model: {component: nested shapes}} of the published models."""
    same_shapes = {"sample_size", "scaling_factor", "force_upcast"}
    known = {}  # tracing takes a second, and the models share components

    def shapes_of(kind, config):
        key = json.dumps({k: v for k, v in config.items() if k not in same_shapes})
        if key not in known:
            known[key] = parameter_shapes(KINDS[kind].build(config, jnp.bfloat16))
        return known[key]

    return {
        model: {k: shapes_of(k, configs[k]) for k in KINDS.keys() & configs.keys()}
        for model, configs in architectures.MODELS.items()
    }


def unet_of_emoji_sd():
    config = json.loads((EMBEDDED / "unet" / "config.json").read_text())
    return parameter_shapes(KINDS["unet"].build(config, jnp.bfloat16))


def count(tree):
    return sum(a.size for a in jax.tree.leaves(tree))


@pytest.mark.slow
@pytest.mark.parametrize("name", list(fits.SIZES))
def test_sizes_are_those_of_the_models_shapes(shapes, name):
    size, parts = fits.SIZES[name], shapes[name]
    trained, frozen = select_trainable(parts["unet"], "cross_attention")
    assert size.unet == count(trained) + count(frozen)
    assert size.cross_attention == count(trained)
    assert size.vae == count(parts["vae"])
    text = [count(parts[kind]) for kind in parts if kind.startswith("text_encoder")]
    assert size.text == sum(text)
    is_upcast = architectures.MODELS[name]["vae"].get("force_upcast", False)
    assert size.vae_bytes == (4 if is_upcast else 2)


def test_bytes_of_sdxl():
    gift, gate = (need for need in fits.needs() if need.model.startswith("SDXL"))
    assert gift.trained == 545_670_400 and gate.trained == 2_567_463_684
    assert gift.trained_bytes == gift.gradients_bytes == 4 * 545_670_400
    assert gift.moments_bytes == 2 * 2 * 4 * 545_670_400  # two optimizers
    assert gate.moments_bytes == 2 * 4 * 2_567_463_684
    frozen = 2 * (2_567_463_684 + 123_060_480 + 694_659_840) + 4 * 83_653_863
    assert gift.frozen_bytes == gate.frozen_bytes == frozen
    assert gift.total_bytes == frozen + 24 * 545_670_400
    assert gift.devices_for(gift.total_bytes) == 1
    assert gift.devices_for(gift.total_bytes - 1) == 2
    assert gift.devices_for(frozen) is None


@pytest.mark.parametrize("method, phase", [("gift", 1), ("gift_gate", 2)])
def test_the_step_holds_what_is_counted(method, phase):
    cfg = load_config(f"configs/emoji_{method}.py", "train")
    cfg.compute_dtype = "bfloat16"
    mesh = sharding.make_mesh(jax.devices()[:1])
    _, (state, frozen, *_) = tpu.train_step(train.resolve(cfg), mesh, phase)
    unet = unet_of_emoji_sd()
    attention = count(select_trainable(unet, "cross_attention")[0])
    size = fits.Size("emoji-sd", count(unet), attention, 0, 0)
    label = next(name for name in fits.OPTIMIZERS if name.split(",")[0] == method)
    need = fits._need(size, label)

    def in_bytes(tree):
        return sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(tree))

    assert in_bytes(state.params) == need.trained_bytes == need.gradients_bytes
    small = sum(a.dtype.itemsize for a in jax.tree.leaves(state.opt) if not a.ndim)
    assert in_bytes(state.opt) == need.moments_bytes + small
    owned = in_bytes(frozen.pop("owned", {}))
    assert in_bytes(frozen) == need.read_bytes
    assert owned < need.trained_bytes  # bytes of one bit, of some parameters


def test_lines_of_problems_are_single():
    report = doctor.examine()
    report["caches"]["writable"] = "no (Read-only file system)"
    report["machine"]["memory_free_bytes"] = 0
    lines = problems.problems(report)
    assert len(lines) == 2 and not any("\n" in line for line in lines)
