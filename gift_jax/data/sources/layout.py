# SPDX-License-Identifier: Apache-2.0
"""What a folder of images holds, by the names in it: its images and their captions.

Read are the layouts of DreamBooth scripts (images under one prompt), of Hugging Face's
imagefolder (metadata.csv or metadata.jsonl, also one level down), of trainers that want
a text file beside each image, and kohya's ("10_sks dog": repeats and prompt).
"""

import dataclasses
import os
import pathlib
import re

from gift_jax.data.images import SUFFIXES
from gift_jax.runtime.errors import UserError, one_line, parse_json, shown

METADATA = ("metadata.csv", "metadata.jsonl")
CAPTIONS = (".txt", ".caption")  # of the text file beside an image
_FORMS = (
    "metadata.csv or metadata.jsonl with the columns file_name and text, or a .txt "
    "beside each image"
)
_MAX_REPEATS = 1000
_KOHYA = re.compile(r"(\d+)_(.*\S.*)")
_ODD = re.compile(r"(metadata|captions?|prompts?)\b.*", re.IGNORECASE)
_DATA = frozenset(
    (
        *(".arrow", ".caption", ".csv", ".json", ".jsonl", ".ndjson", ".parquet"),
        *(".tsv", ".txt", ".xlsx", ".xml", ".yaml", ".yml"),
    )
)


@dataclasses.dataclass(frozen=True)
class Part:
    """Images in one place, and what they are called.

    Attributes: where: the field and the folder, for errors. root: the images' folder.
      prompt: of every image; "": each has its caption. own_name: what a caption falls
      back to, from the folder's name. metadata: the file with the captions, or None.
      images: names, where there is no metadata. repeats: how often each image counts.
      notes, warnings: lines for the log.
    """

    where: str
    root: pathlib.Path
    prompt: str = ""
    own_name: str = ""
    metadata: pathlib.Path | None = None
    images: tuple[str, ...] = ()
    repeats: int = 1
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


def parts(spec) -> list[Part]:
    """Returns the parts of a `PairsSpec` with a folder, or with several.

    Opens no file. Raises: UserError for a folder that is missing, has no images, or has
    captions in a form that is not read; and where a prompt is missing.
    """
    result = []
    for text, prompt in _folders(spec):
        where = f"{spec.field}.folder={one_line(text)}"
        root = pathlib.Path(os.path.expanduser(text))
        result += _parts(spec, where, root, prompt if prompt.strip() else "")
    return result


def is_inside(root, path):
    """Whether a path lies in the folder, links followed."""
    return pathlib.Path(os.path.realpath(path)).is_relative_to(os.path.realpath(root))


def check_inside(where, root, path):
    """Raises UserError for a link that leads out of the folder."""
    if path.is_symlink() and not is_inside(root, path):
        raise UserError(
            f"{where}: {one_line(path.name)} is a link out of the folder; copy there "
            "what it links to"
        )


def is_image(name):
    """Whether a file's name is an image's."""
    return pathlib.PurePath(name).suffix.lower() in SUFFIXES


def caption_file(root, image):
    """Returns the text file beside an image, or None. UserError if there are two."""
    files = [root / image.with_suffix(suffix).name for suffix in CAPTIONS]
    files = [file for file in files if os.path.lexists(file)]
    if len(files) > 1:
        raise UserError(
            f"{one_line(root)} has {' and '.join(one_line(f.name) for f in files)}; an "
            "image must have one file of captions: remove the other"
        )
    return files[0] if files else None


# --- several folders ------------------------------------------------------------------


def _folders(spec):
    """Returns (folder, prompt) of each folder of a spec."""
    field, text = spec.field, spec.folder
    several = None if _is_folder(text) else _texts(text)
    if not several:
        if not _is_folder(text):
            pieces = [piece.strip() for piece in text.split(",")]
            hint = ""
            if len(pieces) > 1 and all(map(_is_folder, pieces)):
                hint = """; give several as '["A", "B"]'"""
            raise UserError(f"{field}.folder={one_line(text)} is not a folder{hint}")
        return [(text, spec.prompt)]
    for folder in several:
        if not _is_folder(folder):
            raise UserError(f"{field}.folder: {one_line(folder)} is not a folder")
        if sum(_real(folder) == _real(other) for other in several) > 1:
            raise UserError(
                f"{field}.folder lists {one_line(folder)} twice; remove one of them"
            )
    prompts = [spec.prompt] * len(several)
    if spec.prompt.lstrip().startswith("["):
        prompts = _texts(spec.prompt)
        if prompts is None or len(prompts) != len(several):
            raise UserError(
                f"{field}.prompt={shown(spec.prompt)} must be one prompt for all "
                f"""{len(several)} folders, or one for each, as '["a dog", "a cat"]'"""
            )
    return list(zip(several, prompts, strict=True))


def _texts(text):
    """Returns the texts of a JSON list, or None if it is none."""
    if not text.lstrip().startswith("["):
        return None
    try:
        values = parse_json(text)
    except (ValueError, RecursionError):
        return None
    return values if all(isinstance(value, str) for value in values) else None


def _is_folder(text):
    return os.path.isdir(os.path.expanduser(text))  # unlike pathlib's, of any name


def _real(text):
    return os.path.realpath(os.path.expanduser(text))


# --- one folder -----------------------------------------------------------------------


def _parts(spec, where, root, prompt):
    names = _names(where, root)
    _refuse_odd(where, root, names)
    if any(name in METADATA for name in names):
        return [_metadata_part(spec, where, root, names, prompt)]
    folders = [name for name in names if os.path.isdir(root / name)]
    if any(is_image(name) for name in names if name not in folders):
        return [_images_part(spec, where, root, names, prompt)]
    by_kohya = [name for name in folders if _KOHYA.fullmatch(name)]
    for name in folders:
        check_inside(where, root, root / name)
    if by_kohya:
        return [_kohya_part(spec, where, root, name, prompt) for name in by_kohya]
    below = {name: _names(where, root / name) for name in folders}
    with_metadata = [name for name in below if set(below[name]) & set(METADATA)]
    if with_metadata:
        return [_split_part(spec, where, root, with_metadata, below, prompt)]
    with_images = [name for name in below if any(map(is_image, below[name]))]
    if with_images:
        paths = [str(root / name) for name in with_images]
        listed = "[" + ", ".join(f'"{path}"' for path in paths[:3]) + "]"
        raise UserError(
            f"{where} has no images, but its folders have: {one_line(paths[0])}; give "
            f"that one, or several as '{one_line(listed)}'"
        )
    raise UserError(f"{where} has no images; put at least one there")


def _names(where, root):
    """Returns what is in a folder, sorted, less hidden files."""
    try:
        return sorted(name for name in os.listdir(root) if not name.startswith("."))
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{where} cannot be read: {reason}") from error


def _refuse_odd(where, root, names):
    """Raises UserError for captions or metadata in a form that is not read."""
    stems = {pathlib.PurePath(name).stem for name in names if is_image(name)}
    for name in names:
        path = pathlib.PurePath(name)
        is_caption = path.suffix in CAPTIONS and path.stem in stems
        is_read = name in METADATA or is_image(name) or is_caption
        if _ODD.fullmatch(name) and not is_read and not os.path.isdir(root / name):
            raise UserError(
                f"{where}: {one_line(name)} looks like captions in a form that is not "
                f"read; write {_FORMS}, or remove it"
            )


def _metadata_part(spec, where, root, names, prompt):
    files = [root / name for name in METADATA if name in names]
    if len(files) > 1:
        raise UserError(
            f"{where} has both {' and '.join(METADATA)}; it must have at most one: "
            "remove the other"
        )
    check_inside(where, root, files[0])
    if not files[0].is_file():  # to read a pipe would wait for a writer
        raise UserError(
            f"{spec.field}.folder: {one_line(files[0])} must be a file; remove it"
        )
    notes = [f"{spec.field}: the prompt given replaces all captions"] if prompt else []
    if any(pathlib.PurePath(name).suffix in CAPTIONS for name in names):
        notes.append(
            f"{root}: captions are those of {files[0].name}, not of .txt files"
        )
    return Part(where, root, prompt, metadata=files[0], notes=tuple(notes))


def _split_part(spec, where, root, splits, below, prompt):
    """Returns the part of an imagefolder's split, such as train/."""
    if len(splits) > 1 and spec.split not in splits:
        raise UserError(
            f"{where} has metadata in {', '.join(map(one_line, splits))}; set "
            f"{spec.field}.split to one of them, or give that folder"
        )
    name = spec.split if spec.split in splits else splits[0]
    _refuse_odd(where, root / name, below[name])
    part = _metadata_part(spec, where, root / name, below[name], prompt)
    note = f"{root}: reads {name}/{part.metadata.name}"
    siblings = [folder for folder in below if folder != name]
    if siblings:
        note += f", nothing of {', '.join(map(one_line, siblings[:3]))}"
    return dataclasses.replace(part, notes=(note, *part.notes))


def _kohya_part(spec, where, root, name, prompt):
    repeats, own_name = _KOHYA.fullmatch(name).groups()
    where = f"{where}/{one_line(name)}"
    if not 1 <= int(repeats[:9]) <= _MAX_REPEATS:
        raise UserError(
            f"{where}: its repeats must be from 1 to {_MAX_REPEATS}; rename it, as "
            f"'10_{one_line(own_name)}'"
        )
    names = _names(where, root / name)
    _refuse_odd(where, root / name, names)
    part = _images_part(spec, where, root / name, names, prompt, own_name)
    return dataclasses.replace(part, repeats=int(repeats))


def _images_part(spec, where, root, names, prompt, own_name=""):
    images = [n for n in names if is_image(n) and not os.path.isdir(root / n)]
    if not images:
        raise UserError(f"{where} has no images; put at least one there")
    by_name = _KOHYA.fullmatch(root.name)
    if by_name and not prompt:
        own_name = by_name[2]
    files = {name: caption_file(root, pathlib.PurePath(name)) for name in images}
    for path in (*(root / name for name in images), *filter(None, files.values())):
        check_inside(where, root, path)
    with_caption = [name for name in images if files[name]]
    others = set(names) - set(images) - {file.name for file in files.values() if file}
    data = sorted(name for name in others if _may_have_captions(root, name))
    notes, warnings = [], []
    if prompt:
        own_name = ""
        if with_caption:
            notes.append(f"{spec.field}: the prompt given replaces all captions")
    elif not with_caption and not own_name and not spec.captions_optional:
        seen = f" ({one_line(data[0])} is none of these)" if data else ""
        raise UserError(
            f"{spec.field}.prompt is empty; a folder without metadata.csv, metadata."
            f"jsonl or a .txt beside each image{seen} needs one prompt"
        )
    elif 0 < len(with_caption) < len(images) and not own_name:
        image = next(name for name in images if not files[name])
        raise UserError(
            f"{where}: {one_line(image)} has no caption, but others have; write "
            f"{one_line(pathlib.PurePath(image).with_suffix('.txt'))}, or set "
            f"{spec.field}.prompt for all"
        )
    elif with_caption or own_name:
        count = f"{len(with_caption)} of {len(images)} images"
        others_are = f"; the others are {own_name!r}"
        notes.append(
            f"{root}: {count} have a caption in a text file"
            f"{others_are if len(with_caption) < len(images) else ''}"
        )
    if data:
        warnings.append(f"{root}: not read, though maybe captions: {_some(data)}")
    others = sorted(others - set(data))
    if others:
        some = _some(others)
        notes.append(f"{root}: ignored {len(others)} that are not images: {some}")
    return Part(
        *(where, root, prompt, own_name, None, tuple(images)),
        notes=tuple(notes),
        warnings=tuple(warnings),
    )


def _may_have_captions(root, name):
    if not os.path.isdir(root / name):
        return pathlib.PurePath(name).suffix.lower() in _DATA
    files = [root / name / file for file in METADATA]
    return bool(_KOHYA.fullmatch(name)) or any(map(os.path.lexists, files))


def _some(names):
    return one_line(", ".join(names[:3])) + (" ..." if len(names) > 3 else "")
