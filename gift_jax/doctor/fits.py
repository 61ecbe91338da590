# SPDX-License-Identifier: Apache-2.0
"""How much memory immunizing a published model takes, by arithmetic.

Counted are the model as it is loaded, in bfloat16, and what the step keeps: trained
parameters, moments and gradients, in float32. Activations come on top of that.
"""

import dataclasses
from typing import Any

GB = 1e9
MAX_DEVICES = 256


@dataclasses.dataclass(frozen=True)
class Size:
    """A published model's parameters, as many as `abstract_model` has.

    Written down because tracing the three takes seconds; a test compares them.
    Attributes: title: with the pixels of a side. unet, cross_attention, text, vae:
      numbers of parameters; cross-attention is a part of the UNet. vae_bytes: of one
      parameter: SDXL's VAE is computed in float32.
    """

    title: str
    unet: int
    cross_attention: int
    text: int
    vae: int = 83_653_863
    vae_bytes: int = 2

    @property
    def frozen_bytes(self) -> int:
        """Of the whole model, as it is loaded."""
        return 2 * (self.unet + self.text) + self.vae_bytes * self.vae


SIZES = {  # of architectures.MODELS
    "sd15": Size("SD 1.5 at 512", 859_520_964, 43_962_560, 123_060_480),
    "sd21": Size("SD 2.1 at 768", 865_910_724, 50_352_320, 340_387_840),
    "sdxl": Size("SDXL at 1024", 2_567_463_684, 545_670_400, 817_720_320, vae_bytes=4),
}
OPTIMIZERS = {"gift": 2, "gift_gate, phase 2": 1}  # that hold moments at a time
ACTIVATIONS = {  # docs/lab/speed.md, "TPU, compiled without one": all temporaries
    "sd15": "for gift 2.80 GB of 4 examples, 0.57 GB with remat=block (TPU compiler)"
}


@dataclasses.dataclass(frozen=True)
class Need:
    """The memory of one method on one model, without activations.

    Attributes: parameters: of the whole model. trained: parameters of the UNet that
      train: its cross-attention for gift, all of it for gift_gate's second phase.
      frozen_bytes: of the model as it is loaded, which stays. read_bytes: of these,
      what the step reads, and what is placed again on several devices.
    """

    model: str
    method: str
    parameters: int
    trained: int
    frozen_bytes: int
    read_bytes: int
    moments_bytes: int

    @property
    def trained_bytes(self) -> int:
        return 4 * self.trained

    @property
    def gradients_bytes(self) -> int:
        return 4 * self.trained

    @property
    def total_bytes(self) -> int:
        """Of all together, on one device."""
        return self.frozen_bytes + self.divided_bytes

    @property
    def divided_bytes(self) -> int:
        """Of what mesh.fsdp divides."""
        return self.trained_bytes + self.moments_bytes + self.gradients_bytes

    def bytes_on(self, devices: int) -> int:
        """Returns the most that one of several devices holds.

        With mesh.fsdp and shard_frozen over all; the loaded model stays on the first.
        """
        if devices == 1:
            return self.total_bytes
        return self.frozen_bytes + (self.divided_bytes + self.read_bytes) // devices

    def devices_for(self, memory: float) -> int | None:
        """Returns how many devices of a memory it takes; None: too many, or none do."""
        counts = [2**i for i in range(MAX_DEVICES.bit_length())]
        return next((n for n in counts if self.bytes_on(n) <= memory), None)

    def as_dict(self, memory: Any) -> dict[str, Any]:
        """Returns its figures; memory: of one device, in bytes, if that is known."""
        is_known = isinstance(memory, int | float)
        return dataclasses.asdict(self) | {
            "trained_bytes": self.trained_bytes,
            "gradients_bytes": self.gradients_bytes,
            "total_bytes": self.total_bytes,
            "devices": self.devices_for(memory) if is_known else "unknown",
        }


def needs() -> list[Need]:
    """Returns what each method needs on each published model."""
    return [_need(size, method) for size in SIZES.values() for method in OPTIMIZERS]


def _need(size: Size, method: str) -> Need:
    trained = size.cross_attention if method == "gift" else size.unet
    # gift reads what it does not train; gift_gate the original beside what it trains
    read = size.unet - (trained if method == "gift" else 0)
    return Need(
        model=size.title,
        method=method,
        parameters=size.unet + size.text + size.vae,
        trained=trained,
        frozen_bytes=size.frozen_bytes,
        read_bytes=2 * read,
        moments_bytes=8 * OPTIMIZERS[method] * trained,  # Adam's two
    )
