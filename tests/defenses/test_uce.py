# SPDX-License-Identifier: Apache-2.0
"""UCE against the published equation, and what it does to emoji-sd's kernels."""

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from gift_jax.defenses import uce
from gift_jax.models import closed_form
from gift_jax.models.load import load_model
from gift_jax.models.trainable import select_trainable
from gift_jax.runtime.errors import UserError

END = 99


def reference(kernel, erase, guide, preserve, s):
    """Eq. 7 of the paper for one weight matrix in PyTorch's layout, in float64."""
    torch = pytest.importorskip("torch")
    W0 = torch.tensor(np.asarray(kernel, np.float64)).T
    left, right = (
        s.regularization * W0,
        s.regularization * torch.eye(W0.shape[1], dtype=W0.dtype),
    )
    for c, g in zip(torch.tensor(erase), torch.tensor(guide), strict=True):
        left = left + s.erase * torch.outer(W0 @ g.double(), c.double())
        right = right + s.erase * torch.outer(c.double(), c.double())
    for c in torch.tensor(preserve).double():
        left = left + s.preserve * torch.outer(W0 @ c, c)
        right = right + s.preserve * torch.outer(c, c)
    return (left @ torch.linalg.inv(right)).T.numpy()


@pytest.mark.parametrize(
    "s", [uce.Uce(), uce.Uce(regularization=0.1, erase=2.0, preserve=0.1)]
)
def test_edit_equals_the_equation(tiny, rng, s):
    erase, guide = rng.normal(size=(2, 3, 32)).astype(np.float32)
    preserve = rng.normal(size=(5, 32)).astype(np.float32)
    edited = closed_form.edit(tiny.params["unet"], erase, guide, preserve, s.weights)
    flat = flatten_dict(tiny.params["unet"], sep="/")
    assert set(edited) == {p for p in flat if "attn2/to_k" in p or "attn2/to_v" in p}
    for path, kernel in edited.items():
        assert kernel.shape == flat[path].shape and kernel.dtype == flat[path].dtype
        expected = reference(flat[path], erase, guide, preserve, s)
        assert np.abs(expected - flat[path]).max() > 0.1  # the edit is an edit
        error = np.abs(kernel - expected).max() / np.abs(expected).max()
        assert error < 1e-5, path


def test_nothing_erased_changes_nothing(tiny, rng):
    none, some = np.zeros((0, 32), np.float32), rng.normal(size=(4, 32))
    for erase, guide in ((none, none), (some, some)):
        edited = closed_form.edit(tiny.params["unet"], erase, guide, some)
        flat = flatten_dict(tiny.params["unet"], sep="/")
        for path, kernel in edited.items():
            np.testing.assert_array_equal(kernel, flat[path])


def test_edit_leaves_its_input_alone(tiny, rng):
    before = jax.device_get(tiny.params["unet"])
    erase, guide = rng.normal(size=(2, 1, 32))
    edited = closed_form.edit(tiny.params["unet"], erase, guide)
    jax.tree.map(np.testing.assert_array_equal, before, tiny.params["unet"])
    trainable, _ = select_trainable(tiny.params["unet"], "cross_attention_kv")
    from_flat = closed_form.edit(trainable, erase, guide)  # flat parameters do as well
    jax.tree.map(np.testing.assert_array_equal, edited, from_flat)


@pytest.fixture(scope="module")
def edited():
    """emoji-sd, "bomb" made "balloon"; name -> last state, and both sets of kernels."""
    model = load_model("emoji-sd")
    names = ["bomb", "balloon", "cat face", "rose", "cherries"]
    ids = model.tokenize(names)
    states = model.encode_text(names)["states"]
    last = closed_form.last_states(states, ids, model.tokenizer.eos_token_id)
    before, _ = select_trainable(model.params["unet"], "cross_attention_kv")
    after = closed_form.edit(model.params["unet"], last[:1], last[1:2], last[2:])
    return dict(zip(names, last, strict=True)), before, after


def test_erased_concept_gets_the_guides_keys_and_values(edited):
    last, before, after = edited
    for path, kernel in after.items():
        was, guide = last["bomb"] @ before[path], last["balloon"] @ before[path]
        gap = np.linalg.norm(was - guide)
        assert gap > 0.1 * np.linalg.norm(guide)  # they differ to begin with
        assert np.linalg.norm(last["bomb"] @ kernel - guide) < 0.05 * gap


def test_preserved_concepts_keep_their_keys_and_values(edited):
    last, before, after = edited
    for name in ("cat face", "rose", "cherries"):
        for path, kernel in after.items():
            moved = np.linalg.norm(last[name] @ (kernel - before[path]))
            erased = np.linalg.norm(last["bomb"] @ (kernel - before[path]))
            assert moved < 0.05 * erased, (name, path)


def test_last_token_is_the_one_before_the_end():
    ids = np.asarray([[1, 5, 6, END, END], [1, END, 0, 0, 0], [1, 5, 6, 7, END]])
    np.testing.assert_array_equal(closed_form.last_token(ids, END), [2, 0, 3])
    text = np.arange(3 * 5 * 2, dtype=np.float32).reshape(3, 5, 2)
    states = closed_form.last_states(text, ids, END)
    np.testing.assert_array_equal(states, text[[0, 1, 2], [2, 0, 3]])
    with pytest.raises(ValueError, match="no end token 99"):
        closed_form.last_token(ids[:, :2], END)


def test_last_token_equals_the_published_scripts(tiny):
    prompts = ["", "a dog", "two birds and a very long list of other things to cut off"]
    ids = tiny.tokenize(prompts)
    mask = tiny.tokenizer(
        prompts, padding="max_length", truncation=True, max_length=tiny.max_length
    )["attention_mask"]
    expected = np.sum(mask, axis=1) - 2
    end = tiny.tokenizer.eos_token_id
    np.testing.assert_array_equal(closed_form.last_token(ids, end), expected)
    assert len(set(expected)) == 3


def test_tails_are_aligned_at_the_last_token():
    ids = np.asarray([[1, 5, 6, END, END]]), np.asarray([[1, END, END, END, END]])
    text = np.arange(10, dtype=np.float32).reshape(2, 1, 5, 1)
    erase, guide = closed_form.tail_states(text[0], ids[0], text[1], ids[1], END)
    np.testing.assert_array_equal(erase[:, 0], [2, 3, 4])
    np.testing.assert_array_equal(guide[:, 0], [5, 6, 7])


@pytest.mark.parametrize(
    "erase, guide, preserve, regularization, message",
    [
        ((2, 32), (1, 32), (1, 32), 0.5, "states to change .2, 32. and guides .1, 32."),
        ((2, 30), (2, 30), (1, 32), 0.5, "must be 32 wide"),
        ((2, 32), (2, 32), (1, 30), 0.5, "must be 32 wide"),
        ((2, 32), (2, 32), (1, 32), 0.0, "regularization=0.0 must be above 0"),
    ],
)
def test_bad_states_are_errors(tiny, erase, guide, preserve, regularization, message):
    arrays = map(np.ones, (erase, guide, preserve))
    s = uce.Uce(regularization=regularization)
    with pytest.raises(ValueError, match=message):
        closed_form.edit(tiny.params["unet"], *arrays, s.weights)


def test_replacement_prompt_may_name_the_style_only():
    uce.Uce(replacement_prompt="{a_style} emoji").check("config.uce")
    message = r"config.uce.replacement_prompt='\{thing\}' may use only \{style\}"
    with pytest.raises(UserError, match=message):
        uce.Uce(replacement_prompt="{thing}").check("config.uce")
