# SPDX-License-Identifier: Apache-2.0
"""A folder of images that are measured, such as another program's samples."""

import dataclasses
import hashlib
import json

import numpy as np

from gift_jax.data.images import CROPS, read_images, short_side
from gift_jax.data.pairs import PairsSpec
from gift_jax.data.sources import folder as folder_source
from gift_jax.runtime import config
from gift_jax.runtime.errors import UserError


@dataclasses.dataclass(frozen=True)
class ImageFolder:
    """The fields of images that are there already."""

    folder: str = config.value(
        "", "of images drawn elsewhere, to measure in place of a model's"
    )
    prompt: str = config.value("", "of every image; replaces the folder's captions")
    caption_column: str = config.value("text", "of the folder's metadata")
    limit: int = config.number(
        0, low=0, doc="images, the first in the folder's order; 0: all"
    )
    crop: str = config.choice("center", CROPS, "to a square; none: squeezed")

    def check(self, field: str) -> None:
        if self.folder:
            folder_source.check(self._spec(field))

    def read(
        self, field: str, size: int = 0, seed: int = 0
    ) -> tuple[np.ndarray, list[str] | None]:
        """Returns (images, uint8 "N H W 3"; their N prompts, or None without captions).

        Args: field: the group's name. size: side in pixels; 0: their own, which must be
          one and the same.
        Raises: UserError naming the folder or the file.
        """
        paths, captions = folder_source.list_images(self._spec(field))
        sides = {short_side(path) for path in paths} if not size else {size}
        if len(sides) > 1:
            raise UserError(
                f"{field}.folder={self.folder}: its images are of {len(sides)} sizes, "
                f"from {min(sides)} to {max(sides)} pixels; set the one to measure at, "
                f"such as --config.resolution={min(sides)}"
            )
        images = read_images(
            ((path, path) for path in paths),
            len(paths),
            sides.pop(),
            crop=self.crop,
            seed=seed,
        )
        prompts = [texts[0] for texts in captions]
        return images, prompts if all(prompts) else None

    def _spec(self, field: str) -> PairsSpec:
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return PairsSpec(**values, captions_optional=True, field=field)


def content_hash(images: np.ndarray, prompts: list[str] | None) -> str:
    """Returns the sha256, hex, of images as they are measured, and of their prompts."""
    digest = hashlib.sha256(f"{images.shape} {json.dumps(prompts)}".encode())
    digest.update(np.ascontiguousarray(images))
    return digest.hexdigest()
