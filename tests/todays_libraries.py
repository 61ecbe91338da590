# SPDX-License-Identifier: Apache-2.0
"""Model folders as today's diffusers and transformers build, save and draw them."""

import shutil
import warnings

import numpy as np
from tiny_model import TINY_SCHEDULER, TINY_TEXT, TINY_VAE, WHOLE_UNET

TOKENIZER = ("vocab.json", "merges.txt", "special_tokens_map.json")
TOKENIZER += ("tokenizer_config.json",)


def write(folder, tokenizer):
    """Writes the tiny model as their classes build it: no prefix of the text encoder.

    Args: tokenizer: a folder with the four files of a tokenizer.
    """
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    DDIMScheduler.from_config(TINY_SCHEDULER).save_pretrained(folder / "scheduler")
    UNet2DConditionModel.from_config(WHOLE_UNET).save_pretrained(folder / "unet")
    AutoencoderKL.from_config(TINY_VAE).save_pretrained(folder / "vae")
    CLIPTextModel(CLIPTextConfig(**TINY_TEXT)).save_pretrained(folder / "text_encoder")
    shutil.copytree(tokenizer, folder / "tokenizer")
    shutil.copyfile(tokenizer.parent / "model_index.json", folder / "model_index.json")
    return folder


def pipeline(folder, **how):
    """Returns StableDiffusionPipeline.from_pretrained(folder), quiet."""
    from diffusers import StableDiffusionPipeline

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe = StableDiffusionPipeline.from_pretrained(str(folder), **how)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def save(pipe, folder, tokenizer):
    """Saves a pipeline, its tokenizer's files as they were: those four."""
    pipe.save_pretrained(str(folder))
    shutil.rmtree(folder / "tokenizer")
    shutil.copytree(tokenizer, folder / "tokenizer")
    return folder


def draw(pipe, prompt, noise_CHW, steps):
    """Returns a float picture "H W 3" in [0, 1], without guidance."""
    import torch

    z = torch.tensor(np.asarray(noise_CHW)[None], dtype=pipe.unet.dtype)
    images = pipe(
        prompt, num_inference_steps=steps, guidance_scale=1, latents=z, output_type="np"
    ).images
    return np.asarray(images[0], np.float32)
