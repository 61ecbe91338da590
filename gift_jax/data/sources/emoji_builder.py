# SPDX-License-Identifier: Apache-2.0
"""The embedded emoji set as a `tensorflow-datasets` builder that needs no TensorFlow.

Pictures are given as encoded PNG bytes and stored in ArrayRecord files, which
`as_data_source()` and Grain read directly. Kept apart from `gift_jax.data.emoji`
because importing tensorflow_datasets takes seconds.
"""

import contextlib
import csv
import hashlib
import io
import os
import pathlib
import shutil
import tempfile

import numpy as np
import tensorflow_datasets as tfds
from absl import logging
from PIL import Image

from gift_jax.data.sources import emoji
from gift_jax.runtime import files
from gift_jax.runtime.errors import UserError

_FILES = ("emoji64.npz", "metadata.csv")


class Emoji64(tfds.core.GeneratorBasedBuilder):
    """2,880 pictures of 480 things by six artists, 64x64, RGB over white."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First release."}

    def _info(self):
        return self.dataset_info_from_configs(
            description=self.__doc__,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(
                        shape=(emoji.SIZE, emoji.SIZE, 3), encoding_format="png"
                    ),
                    "row": np.int32,
                    "concept": tfds.features.Text(),
                    "style": tfds.features.Text(),
                    "group": tfds.features.Text(),
                    "subgroup": tfds.features.Text(),
                    "held_out": np.bool_,
                }
            ),
        )

    def _split_generators(self, dl_manager):
        del dl_manager  # nothing is downloaded
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        rows = read_rows()
        concepts = sorted({row["concept"] for row in rows})
        concept_id = {name: i for i, name in enumerate(concepts)}
        with np.load(emoji.ASSETS / "emoji64.npz") as arrays:
            pictures = emoji.over_white(arrays["rgba"])
        for row, picture in zip(rows, pictures, strict=True):
            encoded = io.BytesIO()
            Image.fromarray(picture).save(encoded, format="PNG")
            held_out = emoji.is_held_out(
                concept_id[row["concept"]], emoji.STYLES.index(row["style"])
            )
            number = int(row["row"])
            # The feature takes a file object as already encoded bytes.
            encoded.seek(0)
            yield (
                number,
                {**row, "row": number, "image": encoded, "held_out": held_out},
            )


def read_rows():
    """Returns metadata.csv as dicts: row, concept, style, group, subgroup."""
    path = emoji.ASSETS / "metadata.csv"
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def data_source(cache_dir=None):
    """Returns the prepared set as a random-access source of undecoded records.

    Args: cache_dir: see `gift_jax.data.emoji.load`.
    Raises: UserError if the folder cannot be written.
    """
    builder = tfds.builder_from_directory(prepare(cache_dir))
    return builder.as_data_source(
        "train", decoders={"image": tfds.decode.SkipDecoding()}
    )


def prepare(cache_dir=None):
    """Prepares the set once and returns its folder.

    Work is done in a private folder that is then renamed into place, so processes that
    start together cannot see a half-written set: the first rename wins and the others
    throw theirs away. The folder's name carries a hash of the asset files.
    """
    root = cache_root(cache_dir)
    final = root / f"emoji64-{_assets_hash()}"
    dataset = final / "emoji64" / "1.0.0"
    if dataset.is_dir():
        return dataset
    scratch = None
    try:
        root.mkdir(parents=True, exist_ok=True)
        scratch = pathlib.Path(tempfile.mkdtemp(prefix=".emoji64-", dir=root))
        logging.info("preparing the embedded emoji set in %s", final)
        _build(scratch)
        os.rename(scratch, final)
    except OSError as error:
        if not dataset.is_dir():  # nobody else finished first: a real failure
            raise UserError(
                f"cache folder {root} cannot be written ({error.strerror or error}); "
                "set GIFT_JAX_CACHE to a folder that can"
            ) from error
    finally:
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)
    return dataset


def _build(folder):
    """Prepares the set under `folder`, without the library's chatter."""
    tfds.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            Emoji64(data_dir=folder, file_format="array_record").download_and_prepare()
    finally:
        tfds.enable_progress_bar()
    shutil.rmtree(folder / "downloads", ignore_errors=True)


def cache_root(cache_dir=None):
    """Returns the folder for prepared data, by default in `sharding.cache_folder`."""
    if cache_dir is None:
        cache_dir = files.cache_folder()
    return pathlib.Path(cache_dir).expanduser() / "tfds"


def _assets_hash():
    digest = hashlib.sha256()
    for name in _FILES:
        digest.update((emoji.ASSETS / name).read_bytes())
    return digest.hexdigest()[:12]
