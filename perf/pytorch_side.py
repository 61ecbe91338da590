# SPDX-License-Identifier: Apache-2.0
"""PyTorch's side of perf/vs_pytorch.py: eager PyTorch and diffusers, as they come."""

import os

import torch
import workloads
from diffusers import DDIMScheduler, StableDiffusionPipeline
from diffusers.models.attention import BasicTransformerBlock

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def start() -> None:
    """All cores or the GPU, and TF32 products, as is JAX's default."""
    torch.set_num_threads(os.cpu_count() or 1)
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.set_default_device(DEVICE)
    torch.manual_seed(0)


def wait() -> None:
    """Waits for what the device has been asked to do."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def device_name() -> str:
    return torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu"


def peak_bytes() -> int:
    """Returns the most memory of the GPU that was allocated; 0 where there is none."""
    return torch.cuda.max_memory_allocated() if DEVICE == "cuda" else 0


def _pipeline(folder: str):
    pipe = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipe = pipe.to(DEVICE)
    pipe.text_encoder.float()  # transformers loads it in the dtype that is stored
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sampling(folder: str, prompts: list[str], steps: int, guidance: float):
    """Returns a function that draws images of the prompts."""
    pipe = _pipeline(folder)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)

    def run():
        pipe(
            prompts,
            num_inference_steps=steps,
            guidance_scale=guidance,
            output_type="np",
        )  # on the host, and so waited for

    return run


def training(folder: str):
    """Returns a function that takes a training step of the whole UNet."""
    pipe = _pipeline(folder)
    unet = pipe.unet.train()
    optimizer = torch.optim.AdamW(unet.parameters(), 1e-3)
    side = unet.config.sample_size
    latents = (unet.config.in_channels, side, side)
    arrays = workloads.training_batch(latents, _text_shape(pipe))
    batch = {name: torch.tensor(array) for name, array in arrays.items()}

    def run():
        optimizer.zero_grad()
        out = unet(batch["z_t"], batch["t"].long(), batch["states"]).sample
        torch.nn.functional.mse_loss(out, batch["eps"]).backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        wait()

    return run


def _text_shape(pipe) -> tuple[int, int]:
    return pipe.tokenizer.model_max_length, pipe.text_encoder.config.hidden_size


class Gift:
    """GIFT's outer step in eager PyTorch; call it for one step.

    Args: side: of the latents, 0: the model's own. counts: pairs of each level.
      encodes: every update encodes the image and the prompt anew, as the published
      script of IMMA does. dtype: of what does not train; autocast computes in it.
    """

    def __init__(self, folder, cfg, counts, side: int, encodes: bool, dtype: str):
        self._cfg, self._pipe, self._encodes = cfg, _pipeline(folder), encodes
        unet, vae = self._pipe.unet, self._pipe.vae
        for module in (unet, vae, self._pipe.text_encoder):
            module.requires_grad_(False).to(getattr(torch, dtype))
        self._trained = [p for name, p in unet.named_parameters() if ".attn2." in name]
        for parameter in self._trained:
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
        self._optimizers = {
            level: torch.optim.AdamW(self._trained, cfg[level].lr)
            for level in workloads.LEVELS
        }
        self._abar = self._pipe.scheduler.alphas_cumprod.to(DEVICE)
        self._mixed = torch.autocast(
            DEVICE, torch.bfloat16, enabled=dtype == "bfloat16"
        )
        side = side or unet.config.sample_size
        latents = (unet.config.in_channels, side, side)
        self._pairs = {}
        for group, count in counts.items():
            arrays = workloads.random_pairs(count, latents, _text_shape(self._pipe))
            self._pairs[group] = {k: torch.tensor(a) for k, a in arrays.items()}
        pixels = side * 2 ** (len(vae.config.block_out_channels) - 1)
        self._image = torch.rand(counts["safe"], 3, pixels, pixels) * 2 - 1

    def __call__(self):
        self._update("lower", self._losses("safe").mean())
        with _Recorded(self._pipe.unet, BasicTransformerBlock) as hiddens:
            loss = self._losses("harmful").mean()
        noising = sum(map(_noising, hiddens)) / len(hiddens)
        self._update("upper", self._cfg.gift.beta * noising - loss)
        wait()

    def _losses(self, group):
        with self._mixed:
            z, text = self._encode() if self._encodes else self._sample(group)
            eps = torch.randn_like(z)
            t = torch.randint(0, 1000, (len(z),))
            signal = self._abar[t].view(-1, 1, 1, 1)
            z_t = signal.sqrt() * z + (1 - signal).sqrt() * eps
            out = self._pipe.unet(z_t, t, text).sample
            return (out.float() - eps).square().flatten(1).mean(1)

    def _sample(self, group):
        pairs = self._pairs[group]
        noise = torch.randn_like(pairs["mean"])
        return pairs["mean"] + pairs["std"] * noise, pairs["states"]

    @torch.no_grad()
    def _encode(self):
        vae, tokenizer = self._pipe.vae, self._pipe.tokenizer
        z = vae.encode(self._image.to(vae.dtype)).latent_dist.sample()
        ids = tokenizer(
            ["a photo of sks purse"] * len(self._image),
            padding="max_length",
            max_length=tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        ).input_ids.to(DEVICE)
        return z * vae.config.scaling_factor, self._pipe.text_encoder(ids)[0]

    def _update(self, level, loss):
        loss.backward()
        clip_norm = self._cfg[level].clip_norm
        torch.nn.utils.clip_grad_norm_(self._trained, clip_norm)
        self._optimizers[level].step()
        self._optimizers[level].zero_grad()
        float(loss.detach())


class _Recorded:
    """Collects what the modules of a class return, while it is entered."""

    def __init__(self, root, kind):
        self._modules = [m for m in root.modules() if isinstance(m, kind)]

    def __enter__(self):
        outputs: list = []
        self._handles = [
            module.register_forward_hook(lambda _, __, out: outputs.append(out))
            for module in self._modules
        ]
        return outputs

    def __exit__(self, *_):
        for handle in self._handles:
            handle.remove()


def _noising(hidden):
    """Representation noising of one layer, the noise distributed as its states."""
    hidden = hidden.float()
    fixed = hidden.detach()
    std, mean = torch.std_mean(fixed, (0, 1), correction=0, keepdim=True)
    return (hidden - mean - std * torch.randn_like(fixed)).square().mean()
