# SPDX-License-Identifier: Apache-2.0
"""The embedded emoji set as a `tensorflow-datasets` builder that needs no TensorFlow.

For the `tfds` source, and for whoever reads datasets that way:

    python -c "from gift_jax.data.sources import emoji_builder as b; b.prepare('DIR')"
    ... --config.safe.tfds=emoji64 --config.safe.tfds_data_dir=DIR

Images are stored as PNG in ArrayRecord files, which `as_data_source()` and Grain read.
`emoji.load` does not need them.
"""

import contextlib
import io
import pathlib
import types

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from gift_jax.data.sources import emoji


class Emoji64(tfds.core.GeneratorBasedBuilder):
    """2,880 images of 480 concepts by six artists, 64x64, RGB over white."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = types.MappingProxyType({"1.0.0": "First release."})

    def _info(self):
        image = tfds.features.Image(
            shape=(emoji.SIZE, emoji.SIZE, 3), encoding_format="png"
        )
        texts = ("concept", "style", "group", "subgroup")
        features = {"image": image, "row": np.int32, "held_out": np.bool_}
        features |= {name: tfds.features.Text() for name in texts}
        return self.dataset_info_from_configs(
            description=self.__doc__, features=tfds.features.FeaturesDict(features)
        )

    def _split_generators(self, dl_manager):
        del dl_manager  # nothing is downloaded
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        data = emoji.load()
        for number, row in enumerate(emoji.read_metadata()):
            encoded = io.BytesIO()  # the feature takes a file object as encoded bytes
            Image.fromarray(data.images[number]).save(encoded, format="PNG")
            encoded.seek(0)
            held_out = bool(data.held_out[number])
            extra = {"row": number, "image": encoded, "held_out": held_out}
            yield number, {**row, **extra}


def prepare(data_dir):
    """Writes the prepared set under data_dir, unless it is there; returns its folder.

    Raises: OSError if the folder cannot be written.
    """
    builder = Emoji64(data_dir=data_dir, file_format="array_record")
    tfds.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            builder.download_and_prepare()
    finally:
        tfds.enable_progress_bar()
    return pathlib.Path(builder.data_dir)
