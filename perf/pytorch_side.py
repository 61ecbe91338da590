# SPDX-License-Identifier: Apache-2.0
"""PyTorch's side of perf/vs_pytorch.py: PyTorch and diffusers, as they come or fast.

As they come, attention is `scaled_dot_product_attention` (AttnProcessor2_0) already.
Fast: inductor compiles the networks and representation noising, weights are channels
last, and so what convolutions return, AdamW is fused.
"""

import os

import torch
import workloads
from diffusers import DDIMScheduler, StableDiffusionPipeline
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.upsampling import Upsample2D
from torch._dynamo.exc import TorchDynamoException

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MAX_ERROR = 0.1  # of a compiled gradient, relative; 0.01 is usual in bfloat16


class WrongGradient(Exception):
    """A compiled step has another gradient than the eager one."""


FAILURES = TorchDynamoException, WrongGradient  # of compilation: of a part alone


def build(part: str, folder: str, dtype: str, batch: int, compiled: bool = False):
    """Returns a function that does the part's work once and waits for it.

    On all cores or the GPU, with TF32 products, as is JAX's default.
    """
    torch.set_num_threads(os.cpu_count() or 1)
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.set_default_device(DEVICE)
    torch.manual_seed(0)
    pipe = _pipeline(folder, compiled)
    if part == "emoji-sampling":
        return _sampling(pipe)
    if part == "emoji-step":
        return Training(pipe, compiled)
    cfg = workloads.gift_config()
    counts = workloads.pair_counts(part, cfg, batch)
    side, encodes = workloads.latent_side(part), "encode" in part
    return Gift(pipe, cfg, counts, side, encodes, dtype, compiled)


def check(run) -> None:
    """Raises WrongGradient unless a compiled step has the gradient of the eager one."""
    if not hasattr(run, "gradient"):
        return
    compiled = run.gradient()
    with torch.compiler.set_stance("force_eager"):
        eager = run.gradient()
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
    error = float((compiled - eager).norm() / eager.norm())
    if not error < MAX_ERROR:
        raise WrongGradient(
            f"compiled, the gradient differs by {error:.2g} of its norm"
        )


def wait() -> None:
    """Waits for what the device has been asked to do."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def device_name() -> str:
    return torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu"


def peak_bytes() -> int:
    """Returns the most memory of the GPU that was allocated; 0 where there is none."""
    return torch.cuda.max_memory_allocated() if DEVICE == "cuda" else 0


def _pipeline(folder: str, compiled: bool):
    pipe = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipe = pipe.to(DEVICE)
    pipe.text_encoder.float()  # transformers loads it in the dtype that is stored
    pipe.set_progress_bar_config(disable=True)
    if compiled:
        for network in (pipe.unet, pipe.vae):
            network.to(memory_format=torch.channels_last)
        for module in pipe.unet.modules():
            if isinstance(module, Upsample2D):
                module.forward = _upsample(module)
        pipe.unet.compile()
        pipe.text_encoder.compile()
        pipe.vae.encode = torch.compile(pipe.vae.encode)
        pipe.vae.decode = torch.compile(pipe.vae.decode)
    return pipe


def _upsample(module: Upsample2D):
    """Returns its forward pass, which inductor compiles correctly.

    As diffusers has it, with `interpolate`, the gradient is 0 where what comes in is
    channels last (PyTorch 2.13.0, CPUs).
    """

    def forward(x_BCHW, output_size=None):
        B, C, H, W = x_BCHW.shape
        twice = x_BCHW[:, :, :, None, :, None].expand(B, C, H, 2, W, 2)
        return module.conv(twice.reshape(B, C, 2 * H, 2 * W))

    return forward


def _adamw(parameters, lr: float, compiled: bool):
    return torch.optim.AdamW(parameters, lr, fused=True if compiled else None)


def _sampling(pipe):
    prompts = list(workloads.PROMPTS)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)

    def run():
        pipe(
            prompts,
            num_inference_steps=workloads.SAMPLING_STEPS,
            guidance_scale=workloads.GUIDANCE,
            output_type="np",
        )  # on the host, and so waited for

    return run


class Training:
    """A training step of the whole UNet; call it for one."""

    def __init__(self, pipe, compiled: bool):
        self._unet = pipe.unet.train()
        self._optimizer = _adamw(self._unet.parameters(), 1e-3, compiled)
        config = self._unet.config
        latents = (config.in_channels, config.sample_size, config.sample_size)
        arrays = workloads.training_batch(latents, _text_shape(pipe))
        self._batch = {name: torch.tensor(array) for name, array in arrays.items()}

    def __call__(self):
        self._backward()
        torch.nn.utils.clip_grad_norm_(self._unet.parameters(), 1.0)
        self._optimizer.step()
        wait()

    def gradient(self):
        """Returns the gradient, flat."""
        self._backward()
        return _gradient(self._unet.parameters())

    def _backward(self):
        self._optimizer.zero_grad()
        batch = self._batch
        out = self._unet(batch["z_t"], batch["t"].long(), batch["states"]).sample
        torch.nn.functional.mse_loss(out, batch["eps"]).backward()


def _gradient(parameters):
    return torch.cat([p.grad.float().flatten() for p in parameters])


def _text_shape(pipe) -> tuple[int, int]:
    return pipe.tokenizer.model_max_length, pipe.text_encoder.config.hidden_size


class Gift:
    """GIFT's outer step in PyTorch; call it for one step.

    Args: side: of the latents, 0: the model's own. counts: pairs of each level.
      encodes: every update encodes the image and the prompt anew, as the published
      script of IMMA does. dtype: of what does not train; autocast computes in it.
    """

    def __init__(
        self, pipe, cfg, counts, side: int, encodes: bool, dtype: str, compiled: bool
    ):
        self._cfg, self._pipe, self._encodes = cfg, pipe, encodes
        unet, vae = pipe.unet, pipe.vae
        for module in (unet, vae, self._pipe.text_encoder):
            module.requires_grad_(False).to(getattr(torch, dtype))
        self._trained = [p for name, p in unet.named_parameters() if ".attn2." in name]
        for parameter in self._trained:
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
        self._optimizers = {
            level: _adamw(self._trained, cfg[level].lr, compiled)
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
        self._hiddens: list | None = None  # what the blocks return, where it is asked
        for module in unet.modules():
            if isinstance(module, BasicTransformerBlock):
                module.register_forward_hook(self._record)
        self._noising = torch.compile(_noising) if compiled else _noising

    def _record(self, module, inputs, output):
        if self._hiddens is not None:
            self._hiddens.append(output)

    def gradient(self):
        """Returns the gradient of both levels, flat; without noise, its own each."""
        torch.manual_seed(0)
        self._losses("safe").mean().backward()
        loss, hiddens = self._recorded_loss()
        (sum(h.float().square().mean() for h in hiddens) - loss).backward()
        gradient = _gradient(self._trained)
        for parameter in self._trained:
            parameter.grad = None
        return gradient

    def __call__(self):
        self._update("lower", self._losses("safe").mean())
        loss, hiddens = self._recorded_loss()
        noising = sum(map(self._noising, hiddens)) / len(hiddens)
        self._update("upper", self._cfg.gift.beta * noising - loss)
        wait()

    def _recorded_loss(self):
        self._hiddens = []
        loss = self._losses("harmful").mean()
        hiddens, self._hiddens = self._hiddens, None
        return loss, hiddens

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


def _noising(hidden):
    """Representation noising of one layer, the noise distributed as its states."""
    hidden = hidden.float()
    fixed = hidden.detach()
    std, mean = torch.std_mean(fixed, (0, 1), correction=0, keepdim=True)
    return (hidden - mean - std * torch.randn_like(fixed)).square().mean()
