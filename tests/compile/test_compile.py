# SPDX-License-Identifier: Apache-2.0
"""Compiling ahead of time: the step is train's own, and the report adds up."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import jax
import pytest
from flax.traverse_util import flatten_dict

import gift_jax
from gift_jax import train
from gift_jax.compile import child as compile_child
from gift_jax.compile import fit, hlo, tpu
from gift_jax.defenses import base
from gift_jax.models import load
from gift_jax.models.load import EMBEDDED
from gift_jax.runtime import cli, devices
from gift_jax.runtime.config import load_config
from gift_jax.runtime.errors import UserError
from gift_jax.training import loop, sharding

ROOT = pathlib.Path(gift_jax.__file__).parents[1]
GIFT = ROOT / "configs" / "emoji_gift.py"
GATE = ROOT / "configs" / "emoji_gift_gate.py"
BASELINES = ROOT / "configs" / "emoji_baselines.py"


# --- the step -------------------------------------------------------------------------


class Taken(Exception):
    pass


@pytest.mark.parametrize(
    "method, dtype",
    [
        ("gift", "bfloat16"),
        ("imma", "float32"),
        pytest.param("gift", "float32", marks=pytest.mark.slow),
        pytest.param("imma", "bfloat16", marks=pytest.mark.slow),
    ],
)
def test_it_is_the_step_that_train_takes(
    tiny_folder, tmp_path, monkeypatch, method, dtype
):
    flags = [f"--config.compute_dtype={dtype}"]
    given = {}
    config, groups = METHODS[method], base.load(method).groups

    def take(state, step, frozen, batches, key, *, place, **_):
        given["args"] = state, frozen, place(next(batches)), key
        given["step"] = step
        raise Taken

    monkeypatch.setattr(loop, "run", take)
    monkeypatch.setattr(devices, "num_cores", jax.device_count)
    argv = [f"--config={config}", f"--workdir={tmp_path}", *flags]
    argv += [f"--config.model={tiny_folder}", "--config.samples.num=0"]
    argv += [f"--config.{group}.folder={_pictures(tmp_path)}" for group in groups]
    argv += [f"--config.{group}.names=()" for group in groups]
    argv += [f"--config.{group}.prompt=a thing" for group in groups]
    with pytest.raises(Taken):
        train.main(argv)
    flags = cli.parser("", "compile")
    cfg, _ = cli.parse_config(
        [a for a in argv if not a.startswith("--workdir")], flags, "train"
    )
    mesh = sharding.make_mesh(jax.devices(), cfg.hardware.mesh.to_dict())
    step, shapes = tpu.train_step(train.resolve(cfg), mesh)

    def described(a):
        return a.shape, a.dtype, a.sharding

    assert jax.tree.map(described, shapes) == jax.tree.map(described, given["args"])
    ours = step.lower(*shapes).as_text()
    theirs = loop.compile_step(given["step"], given["args"]).lower(*given["args"])
    assert ours == theirs.as_text()
    other = loop.compile_step(lambda *a: given["step"](*a)[::-1], None).lower(*shapes)
    assert other.as_text() != ours  # texts do tell steps apart


METHODS = {"gift": f"{GIFT}:smoke", "imma": f"{BASELINES}:imma_smoke"}


def _pictures(tmp_path):
    from tiny_model import write_pictures

    folder = tmp_path / "pictures"
    if not folder.exists():
        folder.mkdir()
        write_pictures(folder, 4, 3)
    return folder


def test_published_models_need_no_files(monkeypatch):
    monkeypatch.setattr(load.hub, "fetch", None)
    cfg = load_config(str(ROOT / "configs" / "sd15_object.py")).unlock()
    model = tpu.abstract_model(cfg)
    unet = sum(a.size for a in jax.tree.leaves(model.params["unet"]))
    assert unet == 859_520_964
    assert model.latent_shape == (4, 64, 64)
    assert model.path is None
    assert EMBEDDED.name == "emoji-sd"
    cfg.model, cfg.resolution = "emoji-sd", 0
    assert tpu.abstract_model(cfg).latent_shape == (8, 8, 8)


@pytest.mark.parametrize("method, why", [("uce", "takes no"), ("esd", "draws before")])
def test_methods_without_such_a_step_are_named(tiny_folder, method, why):
    cfg = load_config(f"{BASELINES}:{method}")
    cfg.model = str(tiny_folder)
    with pytest.raises(UserError, match=f"config.method={method} {why}"):
        tpu.train_step(train.resolve(cfg), sharding.make_mesh(jax.devices()))


@pytest.mark.slow
def test_phases_of_a_defense():
    cfg = load_config(f"{GATE}:smoke")
    run, mesh = train.resolve(cfg), sharding.make_mesh(jax.devices())
    _, (detect, *_) = tpu.train_step(run, mesh)
    step, (preserve, frozen, batch, key) = tpu.train_step(run, mesh, 2)
    unet = flatten_dict(tpu.abstract_model(run).params["unet"], sep="/")
    assert preserve.params.keys() == unet.keys() > detect.params.keys()
    assert frozen["owned"].keys() <= unet.keys() and batch.keys() == {"safe"}
    new, _ = step.eval_shape(preserve, frozen, batch, key)
    assert jax.tree.structure(new) == jax.tree.structure(preserve)
    with pytest.raises(UserError, match="--phase=3: config.method=gift_gate has 2"):
        tpu.train_step(run, mesh, 3)


def test_a_pass_of_the_unet_has_gradients_of_the_trainable_set(tiny_folder):
    cfg = load_config(f"{GIFT}:smoke")
    cfg.model, cfg.hardware.remat = str(tiny_folder), "block"
    run, mesh = train.resolve(cfg), sharding.make_mesh(jax.devices())
    step, shapes = tpu.unet_step(run, mesh, 4)
    grads = step.eval_shape(*shapes)
    assert grads.keys() == shapes[0].keys()
    assert grads and all("/attn2/" in path for path in grads)
    text = step.lower(*shapes).as_text()
    cfg.hardware.remat = "none"
    other, _ = tpu.unet_step(train.resolve(cfg), mesh, 4)
    assert text != other.lower(*shapes).as_text()


# --- the report -----------------------------------------------------------------------

HLO = """
  %all-reduce.1 = f32[10,20]{1,0:T(8,128)} all-reduce(%x), replica_groups={}
  %all-reduce.2 = (f32[5]{0}, bf16[4]{0}) all-reduce(%x, %y), to_apply=%sum
  %ag = (f32[2,8]{1,0}, f32[8,8]{1,0}) all-gather-start(%x), dimensions={0}
  %agd = f32[8,8]{1,0} all-gather-done(%ag)
  %fusion = f32[3]{0} fusion(%all-reduce.1), kind=kLoop
"""


def test_collectives_are_counted_once_with_what_they_return():
    assert hlo.collectives(HLO) == {
        "all-reduce": {"count": 2, "bytes": 4 * 200 + 4 * 5 + 2 * 4},
        "all-gather": {"count": 1, "bytes": 4 * 64},
    }


def test_flops_of_attention_kernels_are_added():
    two = "(f32[4,512,128]{2,1,0}, bf16[4,8,512,40]{3,2,1,0}, f32[4,8,512]{2,1,0})"
    text = f"  %splash_mha_fwd_residuals.1 = {two} custom-call(%a), op\n"
    each = 2 * 4 * 8 * 512 * 512 * 40
    assert hlo.attention_flops(text) == 2 * each
    text += f"  %splash_mha_dkv_no_residuals = {two} custom-call(%a)\n"
    assert hlo.attention_flops(text + HLO) == (2 + 4) * each


def memory_of(fixed, each, capacity, tried):
    """A stand-in for compiling: batch -> report, or DoesNotFit."""

    def attempt(batch):
        tried.append(batch)
        used = fixed + each * batch + 0.01 * each * batch % 7  # nearly a line
        if used > capacity:
            raise fit.DoesNotFit(used)
        sizes = {"used": used, "capacity": capacity, "temporaries": 0.8 * each * batch}
        return {"hbm_bytes": sizes, "batch": batch}

    return attempt


@pytest.mark.parametrize("low", [1, 4, 64])
@pytest.mark.parametrize("largest", [1, 2, 7, 25, 61])
def test_fit_finds_the_largest_batch_in_few_tries(low, largest):
    tried = []
    attempt = memory_of(3e9, 1e9, 3e9 + 1e9 * (largest + 0.5), tried)
    found = fit.fit(attempt, low)
    assert found["batch"] == largest
    assert found["tried"] == sorted(tried) and len(set(tried)) == len(tried)
    assert len(tried) <= 8


@pytest.mark.parametrize(
    "said, needs",
    [
        (
            "Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm.",
            "22.0 GB",
        ),
        (
            "Ran out of memory on HBM, the total memory required for HLO temporaries "
            "(20.73G) exceeds available HBM (15.75G).",
            "22.3 GB",
        ),
        ("Ran out of memory.", "more than there is"),
    ],
)
def test_what_does_not_fit_says_how_large_it_is(said, needs):
    class Lowered:
        def compile(self):
            raise jax.errors.JaxRuntimeError(f"RESOURCE_EXHAUSTED: {said}")

    with pytest.raises(fit.DoesNotFit, match=f"^needs {needs} of a chip$"):
        tpu.compile_lowered(Lowered())


def test_fit_says_so_if_not_even_one_fits():
    with pytest.raises(fit.DoesNotFit, match="needs 6.0 GB"):
        fit.fit(memory_of(5e9, 1e9, 1e9, []), 4)


# --- the command ----------------------------------------------------------------------


@pytest.mark.parametrize("topology", ["v5e", "v9:2x2", "v5e:four", "v5e:4"])
def test_unknown_topologies_are_named(topology):
    with pytest.raises(UserError, match=f"--topology={topology} must be a chip of v4"):
        tpu.chip_of(topology)


def run(*flags, **environ):
    argv = [sys.executable, "-m", "gift_jax.compile", f"--config={GIFT}", *flags]
    done = subprocess.run(
        argv, capture_output=True, text=True, cwd=ROOT, env=os.environ | environ
    )
    return done.returncode, done.stdout, done.stderr


def test_a_missing_compiler_or_folder_is_named(tmp_path):
    code, _, said = run("--topology=v5e:2x2", TPU_LIBRARY_PATH="nowhere.so")
    assert code == 2  # JAX, too, warns of it
    assert said.splitlines()[-1] == "error: TPU_LIBRARY_PATH=nowhere.so is not a file"
    library = tmp_path / "libtpu.so"
    library.touch()
    out = tmp_path / "no" / "report.json"
    flags = "--topology=v5e:2x2", f"--out={out}"
    code, _, said = run(*flags, TPU_LIBRARY_PATH=str(library))
    assert code == 2 and "no such folder" in said


needs_compiler = pytest.mark.skipif(
    not os.environ.get("TPU_LIBRARY_PATH") and not importlib.util.find_spec("libtpu"),
    reason="needs libtpu: make test installs it",
)


@needs_compiler
def test_a_wrong_topology_ends_in_one_line():
    code, _, said = run("--topology=v5e:3x5")
    assert code == 2
    assert said.splitlines()[-1].startswith("error: --topology=v5e:3x5")


@pytest.mark.slow
@needs_compiler
def test_chips_send_each_other_the_gradients_alone(tiny_folder, tmp_path):
    found = {}
    for topology in ("v5e:2x2", "v5e:2x4"):
        out = tmp_path / f"{topology[4:]}.json"
        flags = f"--config={GIFT}", f"--config.model={tiny_folder}"
        flags += (
            f"--topology={topology}",
            "--batch-per-chip=2",
            f"--out={out}",
            "--quick",
        )
        code, told, said = run(*flags)
        assert code == 0, said
        assert "all-reduce" in told and "roofline" in told
        assert told.rstrip().endswith("with the compiler's least effort")
        found[topology] = json.loads(out.read_text())
    few, many = found.values()
    assert (few["chips"], many["chips"]) == (4, 8)
    assert few["batch_per_chip"] == {"harmful": 2, "safe": 2}
    for one in found.values():
        assert list(one["collectives"]) == ["all-reduce"]
        sent = one["collectives"]["all-reduce"]["bytes"]
        assert 1 <= sent / (2 * one["trained_bytes"]) < 1.05  # of two levels
        assert 0 < one["hbm_bytes"]["used"] < one["hbm_bytes"]["capacity"]
    assert few["flops"] == pytest.approx(many["flops"], rel=0.01)
    assert few["bytes_accessed"] == pytest.approx(many["bytes_accessed"], rel=0.02)
    memory = (one["hbm_bytes"]["temporaries"] for one in found.values())
    assert next(memory) == pytest.approx(next(memory), rel=0.02)


KERNEL = """
import json
import jax, jax.numpy as jnp
from gift_jax.compile import hlo, tpu
from gift_jax.training import sharding
from gift_jax.models.ops.kernels import Kernels
mesh = sharding.make_mesh(tpu.devices_of("v5e:2x2"))
where = sharding.batch_sharding(mesh)
q = jax.ShapeDtypeStruct((4, 4096, 8, 40), jnp.bfloat16, sharding=where)
for attention in ("plain", "auto"):
    how = Kernels(attention).on(mesh)
    grads = jax.grad(lambda *qkv: how.attend(*qkv).astype(float).sum(), (0, 1, 2))
    compiled = jax.jit(grads, out_shardings=where).lower(q, q, q).compile()
    print(json.dumps(hlo.account(compiled, tpu.CHIPS["v5e"])))
"""


@pytest.mark.slow
@needs_compiler
def test_flash_attention_compiles_and_moves_a_fraction():
    environ = compile_child.environment()
    command = [sys.executable, "-c", KERNEL]
    done = subprocess.run(command, capture_output=True, text=True, env=environ)
    assert done.returncode == 0, done.stderr
    plain, flash = map(json.loads, done.stdout.splitlines())
    assert flash["bytes_accessed"] < 0.1 * plain["bytes_accessed"]
    memory = [one["hbm_bytes"]["temporaries"] for one in (flash, plain)]
    assert memory[0] < 0.1 * memory[1]
    products = 2 + 3 + 4  # forward, and two kernels backward
    assert flash["flops"] == pytest.approx(products * 2 * 8 * 4096**2 * 40, rel=0.02)
