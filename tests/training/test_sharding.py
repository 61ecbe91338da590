# SPDX-License-Identifier: Apache-2.0
"""The mesh, the rules by parameter path, and what does not fit."""

import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from jax.sharding import PartitionSpec

from gift_jax.models.sd.stable_diffusion import PARTITION_RULES as RULES
from gift_jax.runtime import devices
from gift_jax.runtime.devices import TPU_FLAGS, cpu_devices_for
from gift_jax.runtime.errors import UserError
from gift_jax.state import repeat_update
from gift_jax.training import sharding

SIZES = {"data": 1, "fsdp": 2, "tensor": 4}
BLOCK = "down_blocks_0/attentions_0/transformer_blocks_0"


@pytest.mark.parametrize(
    "path, shape, axes",
    [
        (f"{BLOCK}/attn2/to_k/kernel", (768, 320), ("fsdp", "tensor")),
        (f"{BLOCK}/attn2/to_out_0/kernel", (320, 320), ("tensor", "fsdp")),
        (f"{BLOCK}/attn2/to_out_0/bias", (320,), ()),
        (f"{BLOCK}/ff/net_0/proj/kernel", (320, 2560), ("fsdp", "tensor")),
        (f"{BLOCK}/ff/net_2/kernel", (1280, 320), ("tensor", "fsdp")),
        ("down_blocks_0/resnets_0/conv1/kernel", (3, 3, 4, 8), (None,) * 3 + ("fsdp",)),
        ("conv_out/kernel", (3, 3, 4, 3), (None,) * 4),  # 3 does not divide
        (f"{BLOCK}/attn2/to_k/kernel", (768, 322), ("fsdp", None)),
        ("text_model/embeddings/token_embedding/embedding", (512, 32), (None, "fsdp")),
        ("count", (), ()),
    ],
)
def test_rules_divide_a_parameter(path, shape, axes):
    spec = sharding.partition_spec(path, shape, SIZES, RULES)
    assert spec == PartitionSpec(*axes)
    alone = {"data": 8, "fsdp": 1, "tensor": 1}
    assert not any(sharding.partition_spec(path, shape, alone, RULES))


def test_rules_are_the_ones_given():
    rules = ((r"to_k/kernel", ("fsdp",)),)
    path, shape = f"{BLOCK}/attn2/to_k/kernel", (768, 320)
    spec = sharding.partition_spec(path, shape, SIZES, rules)
    assert spec == PartitionSpec(None, "fsdp")
    assert not any(sharding.partition_spec("conv/kernel", shape, SIZES, rules))
    mesh = sharding.make_mesh(jax.devices()[:2], {"data": 1, "fsdp": 2, "tensor": 1})
    tree = {path: np.zeros(shape)}
    assert sharding.shardings(mesh, tree, rules)[path].spec == spec
    whole = sharding.shardings(mesh, tree, RULES)[path].spec
    assert whole == PartitionSpec("fsdp", None)


def test_optimizer_states_are_divided_as_their_parameters(tiny):
    import optax

    mesh = sharding.make_mesh(jax.devices()[:2], {"data": 1, "fsdp": 2, "tensor": 1})
    params = flatten_dict(tiny.params["unet"], sep="/")
    tree = {"params": params, "opt": optax.adam(1e-3).init(params)}
    shardings = sharding.shardings(mesh, tree, RULES)
    adam = shardings["opt"][0]
    assert adam.mu == shardings["params"] == adam.nu
    assert adam.count.spec == PartitionSpec()
    divided = [path for path, s in shardings["params"].items() if any(s.spec)]
    assert sum(params[p].size for p in divided) > 0.9 * sum(
        a.size for a in params.values()
    )
    whole = sharding.shardings(mesh, tree, RULES, repeat=("fsdp",))
    assert not any(any(where.spec) for where in jax.tree.leaves(whole))


def test_rows_of_a_batch_are_read_once():
    for sizes in ((2, 1, 1), (1, 2, 1), (1, 1, 2)):
        shape = dict(zip(sharding.AXES, sizes, strict=True))
        mesh = sharding.make_mesh(jax.devices()[:2], shape)
        assert sharding.process_slice(mesh) == (0, 1)  # one process has all devices
        placed = sharding.put_batch(mesh, {"x": np.arange(8.0)})["x"]
        np.testing.assert_array_equal(placed, np.arange(8.0))
        rows = 8 if sizes[2] > 1 else 4
        assert placed.addressable_shards[0].data.size == rows


@pytest.mark.parametrize(
    "shape, message",
    [
        ((3, 1, 1), "data=3, fsdp=1, tensor=1, but there are 2 devices"),
        ((0, 4, 1), "fsdp=4, tensor=1, but there are 2 devices"),
        ((0, 0, 1), "more than one axis of 0"),
        ((1, -1, 1), "config.hardware.mesh.fsdp=-1 must be at least 0"),
    ],
)
def test_mesh_that_does_not_fit_is_refused(shape, message):
    shape = dict(zip(sharding.AXES, shape, strict=True))
    with pytest.raises(UserError, match=message):
        sharding.make_mesh(jax.devices()[:2], shape)


def test_batch_that_does_not_divide_is_refused():
    mesh = sharding.make_mesh(jax.devices()[:2])
    sharding.check_batch("safe.batch", 12, mesh, accumulate=3)
    with pytest.raises(UserError, match="batch=7 must divide by 2 devices; try .*=6"):
        sharding.check_batch("safe.batch", 7, mesh)
    with pytest.raises(UserError, match="by 2 devices in 3 parts; try .*safe.batch=6"):
        sharding.check_batch("safe.batch", 8, mesh, accumulate=3)


COMPILED = """
import sys
import jax, jax.numpy as jnp
from gift_jax.runtime import devices
counts = [0, 0]
def count(event, *_, **__):
    counts[0] += event == "/jax/core/compile/backend_compile_duration"
    counts[1] += event == "/jax/compilation_cache/cache_hits"
jax.monitoring.register_event_duration_secs_listener(count)
jax.monitoring.register_event_listener(count)
devices.CACHE_MIN_COMPILE_S = float(sys.argv[1])
devices.init_jax()
jax.jit(lambda x: x + 1)(jnp.arange(3))
print(*counts)
"""


def test_second_process_compiles_nothing_that_is_kept(tmp_path):
    def run(min_seconds=0.0):
        """Returns (programs asked for, found in the cache, warnings)."""
        done = subprocess.run(
            [sys.executable, "-c", COMPILED, str(min_seconds)],
            capture_output=True,
            check=True,
            text=True,
            env=os.environ | {"GIFT_JAX_CACHE": str(tmp_path)},
        )
        return *map(int, done.stdout.split()), done.stderr

    programs, hits, _ = run(min_seconds=60)
    assert programs and not hits
    assert run()[:2] == (programs, 0)  # what took less is not kept
    assert run() == (programs, programs, "")
    program = max(tmp_path.glob("xla/*-cache"), key=lambda file: file.stat().st_size)
    whole = program.read_bytes()
    program.write_bytes(whole[: len(whole) // 2])  # a process was killed as it wrote
    program.with_name(program.name[:-5] + "atime").unlink()
    assert run() == (programs, programs - 1, "")
    assert len(program.read_bytes()) > len(whole) // 2  # older JAX varies some bytes


def test_all_devices_share_in_every_update_of_a_level():
    def update(w, opt, frozen, batch, key):
        return w + (batch @ w).mean(), opt, {"lower/loss": w.sum()}

    twice = repeat_update(update, 2)

    def interleaved(w, batch):
        return twice(w, (), None, batch, jax.random.key(0))[0]

    def contiguous(w, batch):
        halves = batch.reshape(2, 8, 64)  # the first on one device
        return jax.lax.scan(lambda w, half: (w + (half @ w).mean(), ()), w, halves)[0]

    mesh = sharding.make_mesh(jax.devices()[:2])
    batch = jax.ShapeDtypeStruct(
        (16, 64), "float32", sharding=sharding.batch_sharding(mesh)
    )
    product = "= f32[4,64]{1,0} dot("  # of a device's rows of an update
    w = jax.numpy.ones((64, 64))
    texts = [
        jax.jit(f).lower(w, batch).compile().as_text()
        for f in (interleaved, contiguous)
    ]
    assert [text.count(product) for text in texts] == [1, 0]


@pytest.mark.parametrize(
    "parts, shape, count",
    [
        ([12, 24], (0, 1, 1), 4),
        ([4], (0, 1, 1), 4),
        ([6], (0, 1, 1), 3),
        ([25, 4], (0, 1, 1), 1),
        ([1], (0, 1, 1), 1),
        ([2], (0, 1, 2), 4),
        ([3], (0, 2, 1), 2),  # does not fit: check_batch raises
        ([8], (1, 3, 1), 3),
        ([2], (2, 1, 0), 4),
    ],
)
def test_cores_become_devices_as_far_as_batches_divide(
    monkeypatch, parts, shape, count
):
    monkeypatch.setattr(devices, "num_cores", lambda: 4)
    shape = dict(zip(sharding.AXES, shape, strict=True))
    assert cpu_devices_for(parts, shape) == count


def test_flags_of_the_tpu_compiler_are_set_unless_they_are_given():
    code = "from gift_jax.runtime import devices; devices.init_jax()\n"
    code += "import os; print(os.environ['LIBTPU_INIT_ARGS'])"
    outputs = []
    for variable in ({}, {"LIBTPU_INIT_ARGS": "--other"}):
        environ = {k: v for k, v in os.environ.items() if k != "LIBTPU_INIT_ARGS"}
        command = [sys.executable, "-c", code]
        done = subprocess.run(
            command, capture_output=True, check=True, text=True, env=environ | variable
        )
        outputs.append(done.stdout.strip())
    assert outputs == [" ".join(TPU_FLAGS), "--other"]
