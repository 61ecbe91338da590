# SPDX-License-Identifier: Apache-2.0
"""Which parameters each rule trains."""

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from gift_jax.models.trainable import TRAINABLE_SETS, select_trainable
from gift_jax.runtime.errors import UserError
from gift_jax.state import merge_params

BLOCK = "mid_block/attentions_0/transformer_blocks_0"
EXPECTED = {
    "cross_attention": {"attn2/to_q", "attn2/to_k", "attn2/to_v", "attn2/to_out_0"},
    "cross_attention_kv": {"attn2/to_k", "attn2/to_v"},
}
EXPECTED["attention"] = EXPECTED["cross_attention"] | {
    name.replace("attn2", "attn1") for name in EXPECTED["cross_attention"]
}


@pytest.mark.parametrize("rule", EXPECTED)
def test_rule_selects_its_projections_in_every_block(tiny, rule):
    trainable, frozen = select_trainable(tiny.params["unet"], rule)
    in_block = {p for p in trainable if p.startswith(BLOCK)}
    modules = {p.removeprefix(BLOCK + "/").rsplit("/", 1)[0] for p in in_block}
    assert modules == EXPECTED[rule]
    assert all("/transformer_blocks_" in path for path in trainable)
    assert len(trainable) == 4 * len(in_block)  # the tiny UNet has four blocks
    assert not set(trainable) & set(frozen)
    assert set(trainable) | set(frozen) == set(
        flatten_dict(tiny.params["unet"], sep="/")
    )


def test_non_cross_attention_trains_what_esd_u_does(tiny):
    """As its authors' code: neither cross-attention nor the output nor the time."""
    trainable, _ = select_trainable(tiny.params["unet"], "non_cross_attention")
    assert not any("/attn2/" in path for path in trainable)
    outside = ("conv_out/", "conv_norm_out/", "time_embedding/")
    assert not any(path.startswith(outside) for path in trainable)
    for part in ("conv_in/", "time_emb_proj/", "/attn1/", "/norm2/", "/ff/"):
        assert any(part in path for path in trainable), part


def test_every_set_is_of_a_test(tiny):
    assert set(TRAINABLE_SETS) == {*EXPECTED, "non_cross_attention", "all"}
    assert tiny.trainable_sets == TRAINABLE_SETS


def test_all_selects_everything(tiny):
    trainable, frozen = select_trainable(tiny.params["unet"], "all")
    assert frozen == {}
    assert len(trainable) == len(jax.tree.leaves(tiny.params["unet"]))


def test_merge_undoes_select(tiny):
    trainable, frozen = select_trainable(tiny.params["unet"], "attention")
    merged = merge_params(trainable, frozen)
    jax.tree.map(np.testing.assert_array_equal, merged, tiny.params["unet"])
    with pytest.raises(ValueError, match="both trainable and frozen"):
        merge_params(trainable, trainable)


def test_unknown_rule_lists_the_choices(tiny):
    with pytest.raises(UserError, match="trainable='cross' must be one of cross_att"):
        select_trainable(tiny.params["unet"], "cross")
