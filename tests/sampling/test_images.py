# SPDX-License-Identifier: Apache-2.0
"""Images of prompts, and grids of them."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

from gift_jax.runtime.errors import UserError
from gift_jax.sampling.images import (
    Samples,
    check_samples,
    draw_images,
    save_image_grid,
)


def test_sample_grid_draws_a_row_a_prompt(tiny, tmp_path):
    samples = Samples(num=3, seed=0, guidance=2.0, steps=2, batch=4)
    path = tmp_path / "samples" / "a.png"
    save_image_grid(tiny, ("a dog", "a cat"), samples, path)
    with Image.open(path) as image:
        assert image.size[0] > image.size[1]


def test_drawn_images_do_not_depend_on_the_batch(tiny):
    samples = Samples(seed=0, guidance=2.0, steps=2, batch=4)
    prompts = ["a dog", "a cat", "a dog"]
    together = draw_images(tiny, prompts, samples)
    samples = dataclasses.replace(samples, batch=2)
    apart = draw_images(tiny, prompts, samples)
    assert together.shape == (3, 16, 16, 3) and together.dtype == np.uint8
    assert (together[0] != together[2]).any()  # the same prompt, noise of its own
    assert np.abs(together.astype(int) - apart.astype(int)).max() <= 1


def test_scheduler_shorter_than_the_samples_is_named(tiny):
    samples = Samples(num=1, steps=1001)
    with pytest.raises(UserError, match="config.samples.steps=1001 must be at most"):
        check_samples(tiny, samples)
    check_samples(tiny, dataclasses.replace(samples, num=0))


@pytest.mark.parametrize(
    "config, name, message",
    [
        ({"thresholding": True}, "", "scheduler='': scheduler thresholding=True; must"),
        (
            {"_class_name": "SASolverScheduler"},
            "",
            "the model's scheduler is 'SASolver",
        ),
        ({"_class_name": "SASolverScheduler"}, "euler", ""),
        (
            {},
            "lcm",
            "scheduler='lcm': steps=60 must be at most original_inference_steps",
        ),
    ],
)
def test_scheduler_that_cannot_draw_the_samples_is_named(tiny, config, name, message):
    model = tiny.replace(scheduler_config=tiny.scheduler_config | config)
    samples = Samples(num=1, steps=60, scheduler=name)
    if message:
        with pytest.raises(UserError, match=f"^config.samples.{message}|{message}"):
            check_samples(model, samples)
    else:
        check_samples(model, samples)
    check_samples(model, dataclasses.replace(samples, num=0))
