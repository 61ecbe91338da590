# SPDX-License-Identifier: Apache-2.0
"""Images of a dataset that `tensorflow-datasets` has prepared on this machine.

Read from its ArrayRecord files, without TensorFlow, without the dataset's own code and
without the network.
"""

import io
import os

from absl import logging

from gift_jax.data import captions
from gift_jax.data.images import read_framed
from gift_jax.runtime.errors import UserError


def read(spec):
    """Returns (images, frames, prompts, names) of a `PairsSpec` with `tfds`.

    Prompts are the texts of `caption_key`, or the names of `label_key`'s classes filled
    into `template`, or all `prompt`; names are those of the classes, else the prompts.
    The first `spec.limit` examples of the split (0: all), in the order of its files.

    Raises: UserError if the data is not prepared, has no such split or key, or has an
      empty caption, a missing label or an unreadable image.
    """
    source, features = _open(spec)
    count = min(len(source), spec.limit or len(source))
    prompts, names = [], []

    def files():
        for i in range(count):
            at = f"{spec.field}.tfds={spec.tfds}, {spec.split} {i}"
            try:
                row = source[i]
            except (RuntimeError, ValueError, OSError) as error:
                raise UserError(
                    f"{at} cannot be read ({_line(error)}); prepare it anew"
                ) from error
            prompt, name = _caption(spec, row, features, at)
            prompts.append(prompt)
            names.append(name)
            yield at, io.BytesIO(row[spec.image_key])

    images, frames = read_framed(
        files(), count, spec.size, crop=spec.crop, seed=spec.seed
    )
    logging.info("read %d images of %s, %s", count, spec.tfds, spec.split)
    return images, frames, prompts, names


def _open(spec):
    """Returns (random access source of undecoded images, features)."""
    import tensorflow_datasets as tfds  # slow

    builder = _builder(spec)
    features = builder.info.features
    keys = {"image_key": spec.image_key}
    keys |= {"caption_key": spec.caption_key} if spec.caption_key else {}
    keys |= {"label_key": spec.label_key} if spec.label_key else {}
    for field, key in keys.items():
        _check_feature(spec, features, field, key)
    decoders = {
        key: tfds.decode.SkipDecoding()
        for key, feature in features.items()
        if isinstance(feature, tfds.features.Image)
    }
    try:
        return builder.as_data_source(spec.split, decoders=decoders), features
    except NotImplementedError as error:
        raise UserError(
            f"{spec.field}.tfds={spec.tfds} is prepared as "
            f"{builder.info.file_format.value}, must be as array_record; set another "
            f"tfds_data_dir and run: {_command(spec, 'DIR')}"
        ) from error
    except (ValueError, OSError) as error:
        raise UserError(
            f"{spec.field}.split={spec.split!r} cannot be read: {_line(error)}"
        ) from error


def _builder(spec):
    # From the files alone: tfds.builder would look for the dataset's code first, and
    # ask a server about data that is not prepared.
    from tensorflow_datasets.core import read_only_builder, registered

    folder = os.path.expanduser(spec.tfds_data_dir) or None
    try:
        return read_only_builder.builder_from_files(spec.tfds, data_dir=folder)
    except registered.DatasetNotFoundError as error:
        raise UserError(
            f"{spec.field}.tfds={spec.tfds} is not prepared; "
            f"run: {_command(spec, folder)}"
        ) from error
    except (ValueError, OSError) as error:
        raise UserError(
            f"{spec.field}.tfds={spec.tfds} cannot be opened: {_line(error)}"
        ) from error


def _command(spec, folder):
    where = f", data_dir={folder!r}" if folder else ""
    code = f"import tensorflow_datasets as tfds; tfds.data_source({spec.tfds!r}{where})"
    return f'python -c "{code}"'


def _check_feature(spec, features, field, key):
    import tensorflow_datasets as tfds

    if key not in features:
        raise UserError(
            f"{spec.field}.{field}={key!r} is no feature of {spec.tfds}; "
            f"choose from {', '.join(features)}"
        )
    kinds = {
        "image_key": (tfds.features.Image, "an Image of uint8 or uint16"),
        "caption_key": (tfds.features.Text, "a Text"),
        "label_key": (tfds.features.ClassLabel, "a ClassLabel"),
    }
    kind, words = kinds[field]
    feature = features[key]
    fits = isinstance(feature, kind)
    if field == "image_key" and fits:  # floats are stored as four bytes in disguise
        fits = feature.np_dtype in ("uint8", "uint16")
    if not fits:
        raise UserError(
            f"{spec.field}.{field}={key!r} is {type(feature).__name__} of "
            f"{spec.tfds}, must be {words}; choose another feature"
        )


def _caption(spec, row, features, at):
    """Returns (prompt, name of the concept) of one example."""
    if spec.caption_key:
        text = row[spec.caption_key].decode("utf-8", "replace")
        if not text.strip():
            raise UserError(f"{at}: {spec.caption_key} is empty; set limit or prompt")
        return text, text
    if not spec.label_key:
        return spec.prompt, spec.prompt
    label, feature = int(row[spec.label_key]), features[spec.label_key]
    if not 0 <= label < feature.num_classes:  # -1 in splits without labels
        raise UserError(
            f"{at}: {spec.label_key}={label} is no class; choose another split"
        )
    name = feature.int2str(label).replace("_", " ")
    return captions.fill(spec.template, name, ""), name


def _line(error):
    return " ".join(str(error).split())
