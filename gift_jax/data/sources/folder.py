# SPDX-License-Identifier: Apache-2.0
"""A folder of images: all under one prompt, or each captioned by a metadata file.

The first is what DreamBooth scripts read; the second is Hugging Face's "imagefolder",
metadata.csv or metadata.jsonl with a column `file_name` and one for the caption.
"""

import csv
import io
import os
import pathlib

from absl import logging

from gift_jax.data.images import SUFFIXES
from gift_jax.runtime.errors import (
    RepeatsError,
    UserError,
    check_once,
    one_line,
    parse_json,
    shown,
)

METADATA = ("metadata.csv", "metadata.jsonl")


def check(spec):
    """Returns the path of the folder's metadata file, or None if it has none.

    Args: spec: a `PairsSpec` with a folder.
    Raises: UserError if there is no such folder, both kinds of metadata, neither
      metadata nor a prompt, or metadata that is no file in the folder.
    """
    root = _root(spec)
    if not os.path.isdir(root):  # unlike pathlib's, of any name
        raise UserError(f"{spec.field}.folder={one_line(spec.folder)} is not a folder")
    files = [root / name for name in METADATA if (root / name).exists()]
    if len(files) > 1:
        raise UserError(
            f"{spec.field}.folder={one_line(spec.folder)} has both "
            f"{' and '.join(METADATA)}; it must have at most one: remove the other"
        )
    if not files and not spec.prompt.strip() and not spec.captions_optional:
        raise UserError(
            f"{spec.field}.prompt is empty; a folder without metadata.csv or "
            "metadata.jsonl needs one prompt"
        )
    for file in files:
        _check_inside(spec, root, file)
        if not file.is_file():  # to read a pipe would wait for a writer
            raise UserError(
                f"{spec.field}.folder: {one_line(file)} must be a file; remove it"
            )
    return files[0] if files else None


def list_images(spec):
    """Returns (paths, prompts) of the images of a `PairsSpec` with a folder.

    Without metadata: the images in the folder itself, sorted by name, all under
    `spec.prompt`; other files are ignored. With: the images that it lists, in its
    order, each under its caption, or all under `spec.prompt` if that is given. The
    first `spec.limit` of them (0: all).

    Raises: UserError of one line for a folder without images, for a link out of the
      folder, and for metadata that is malformed or empty, or lists an image twice,
      outside or missing. Nothing outside the folder is opened.
    """
    file, root = check(spec), _root(spec)
    if file is None:
        paths = _unlisted(spec, root)
        prompts = [spec.prompt] * len(paths)
    else:
        paths, prompts = _listed(spec, root, file)
        if spec.prompt:
            logging.info("%s: the prompt given replaces all captions", spec.field)
    end = spec.limit or None
    return paths[:end], prompts[:end]


def _root(spec):
    return pathlib.Path(os.path.expanduser(spec.folder))


def _is_inside(root, path):
    """Whether a path lies in the folder, links followed."""
    return pathlib.Path(os.path.realpath(path)).is_relative_to(os.path.realpath(root))


def _check_inside(spec, root, path):
    if path.is_symlink() and not _is_inside(root, path):
        raise UserError(
            f"{spec.field}.folder={one_line(spec.folder)}: {one_line(path.name)} is a "
            "link out of the folder; copy there what it links to"
        )


def _unlisted(spec, root):
    try:
        entries = sorted(p for p in root.iterdir() if not p.name.startswith("."))
    except OSError as error:
        reason = error.strerror or error
        raise UserError(
            f"{spec.field}.folder={one_line(spec.folder)} cannot be read: {reason}"
        ) from error
    paths = [p for p in entries if _is_image(p.name) and not p.is_dir()]
    for path in paths:
        _check_inside(spec, root, path)
    others = [p.name for p in entries if p not in set(paths)]
    if others:
        names = one_line(", ".join(others[:3])) + (" ..." if len(others) > 3 else "")
        logging.info("%s: ignored %d that are not images: %s", root, len(others), names)
    if not paths:
        raise UserError(
            f"{spec.field}.folder={one_line(spec.folder)} has no images; put at "
            "least one there"
        )
    return paths


def _is_image(name):
    return pathlib.PurePath(name).suffix.lower() in SUFFIXES


def _listed(spec, root, file):
    """Returns (paths, prompts) of a metadata file."""
    where = f"{spec.field}.folder: {one_line(file)}"
    paths, lines, prompts = [], {}, []
    for line, row in _rows(file, where):
        at = f"{where}, line {line}"
        path = _image_path(root, _text(row, "file_name", at, "name an image"), at)
        real = os.path.realpath(path)
        if real in lines:
            raise UserError(
                f"{at}: file_name={shown(row['file_name'])} is on line {lines[real]} "
                "too; an image must be listed once: remove one of the lines"
            )
        lines[real] = line
        paths.append(path)
        if spec.prompt:
            prompts.append(spec.prompt)
        else:
            fix = f"write one, or set {spec.field}.prompt for all"
            prompts.append(_text(row, spec.caption_column, at, fix))
    if not lines:
        raise UserError(f"{where} lists no images; it must list at least one")
    count = sum(
        _is_image(name) and not name.startswith(".")
        for _, _, names in os.walk(root)
        for name in names
    )
    if count > len(lines):
        logging.info("%s lists %d of %d images there", file, len(lines), count)
    return paths, prompts


def _rows(file, where):
    """Yields (line number, dict) for every row of a metadata file."""
    # A caption's own line ends are left as they are.
    ends = "" if file.suffix == ".csv" else None
    try:
        with file.open(encoding="utf-8-sig", newline=ends) as lines:
            text = lines.read()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{where} cannot be read as UTF-8 text ({error})") from error
    yield from (_csv if file.suffix == ".csv" else _jsonl)(text, where)


def _csv(text, where):
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        check_once(reader.fieldnames or ())
        for row in reader:
            if None in row:
                raise UserError(
                    f"{where}, line {reader.line_num}: more values than the header has "
                    f"columns ({len(reader.fieldnames)}); quote captions with commas"
                )
            yield reader.line_num, row
    except (csv.Error, RepeatsError) as error:
        line = reader.reader.line_num
        raise UserError(
            f"{where}, line {line}: malformed CSV ({error}); mend the line"
        ) from error


def _jsonl(text, where):
    # Not splitlines: a JSON string may hold other line ends, such as U+2028.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = parse_json(line)
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"{where}, line {number}: malformed JSON ({error}); mend the line"
            ) from error
        if not isinstance(row, dict):
            raise UserError(
                f"{where}, line {number}: must be a JSON object such as "
                '{"file_name": "a.png", "text": "a dog"}'
            )
        yield number, row


def _text(row, column, at, fix):
    """Returns a row's value in a column, which must be text and not blank."""
    if column not in row:
        columns = ", ".join(shown(name) for name in list(row)[:12])
        columns += " ..." if len(row) > 12 else ""
        hint = "" if column == "file_name" else ", or name another as caption_column"
        raise UserError(
            f"{at}: no column {shown(column)} among {columns or 'none'}; add it{hint}"
        )
    value = row[column]
    if value is None or (isinstance(value, str) and not value.strip()):
        raise UserError(f"{at}: {one_line(column)} is empty; {fix}")
    if not isinstance(value, str) or not _is_unicode(value):
        raise UserError(f"{at}: {one_line(column)}={shown(value)} must be text; {fix}")
    return value


def _is_unicode(text):
    """Whether a text is whole: JSON can write half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _image_path(root, name, at):
    """Returns the path of an image named in a metadata file; it must be in `root`."""
    relative = pathlib.PurePosixPath(name)
    path = root / relative
    try:
        inside = not relative.is_absolute() and ".." not in relative.parts
        inside = inside and _is_inside(root, path)
        exists = path.is_file()
    except (OSError, ValueError):  # a name too long, or with a null character
        inside, exists = True, False
    if not inside:
        raise UserError(
            f"{at}: file_name={shown(name)} must stay inside {one_line(root)}; move "
            "the image there"
        )
    if not exists:
        raise UserError(
            f"{at}: file_name={shown(name)} is no file in {one_line(root)}; put it "
            "there or remove the line"
        )
    return path
