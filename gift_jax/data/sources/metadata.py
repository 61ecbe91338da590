# SPDX-License-Identifier: Apache-2.0
"""metadata.csv and metadata.jsonl: which images a folder has, and their captions."""

import csv
import io
import os
import pathlib

from absl import logging

from gift_jax.data.sources.layout import is_image, is_inside
from gift_jax.runtime.errors import (
    RepeatsError,
    UserError,
    check_once,
    one_line,
    parse_json,
    shown,
)


def read(spec, part):
    """Returns (paths, captions) of a part with a metadata file.

    captions: a tuple an image: of one text, or of several where the file has several
    lines of the image, or a list. In the file's order.

    Raises: UserError of one line for metadata that is malformed or empty, or lists an
      image outside, missing, or twice alike. Nothing outside the folder is opened.
    """
    where = f"{spec.field}.folder: {one_line(part.metadata)}"
    paths, captions, lines = {}, {}, {}
    for line, row in _rows(part.metadata, where):
        at = f"{where}, line {line}"
        path = _image_path(part.root, _text(row, "file_name", at, "name an image"), at)
        real = os.path.realpath(path)
        paths.setdefault(real, path)
        if part.prompt:
            captions[real] = [part.prompt]
        else:
            fix = f"write one, or set {spec.field}.prompt for all"
            texts = _texts(row, spec.caption_column, at, fix)
            captions.setdefault(real, []).extend(texts)
            for text in texts:
                _check_once(lines, real, text, line, at)
    if not paths:
        raise UserError(f"{where} lists no images; it must list at least one")
    count = sum(
        is_image(name) and not name.startswith(".")
        for _, _, names in os.walk(part.root)
        for name in names
    )
    if count > len(paths):
        logging.info("%s lists %d of %d images there", part.metadata, len(paths), count)
    return list(paths.values()), [tuple(texts) for texts in captions.values()]


def _check_once(lines, real, text, line, at):
    if (real, text) in lines:
        raise UserError(
            f"{at}: {shown(text)} is the image's caption on line {lines[real, text]} "
            "too; remove one of them"
        )
    lines[real, text] = line


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


def _texts(row, column, at, fix):
    """Returns a row's texts in a column: of one text, or of a list of them."""
    if not isinstance(row.get(column), list):
        return [_text(row, column, at, fix)]
    texts = [_text({column: text}, column, at, fix) for text in row[column]]
    if not texts:
        raise UserError(f"{at}: {one_line(column)} is empty; {fix}")
    return texts


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
        inside = inside and is_inside(root, path)
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
