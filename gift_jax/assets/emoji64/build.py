# SPDX-License-Identifier: Apache-2.0
"""Rasterise six openly licensed emoji sets into one captioned image set.

Every emoji that all six sets draw, and that names a thing (an animal, a food,
a vehicle, a tool ...), becomes six 64x64 RGBA images: the same concept in six artists'
styles.

    npm install --prefix DIR @iconify-json/twemoji@1.2.5 @iconify-json/noto@1.2.9 \
        @iconify-json/fluent-emoji-flat@1.2.6 @iconify-json/openmoji@1.2.29 \
        @iconify-json/emojione@1.2.3 @iconify-json/fluent-emoji-high-contrast@1.2.6 \
        openmoji@17.0.0
    pip install pillow resvg-py numpy
    python build.py DIR/node_modules OUT

Writes OUT/emoji64.npz (rgba: uint8 [N, 64, 64, 4], row i described by line i
of the csv) and OUT/metadata.csv (row, concept, style, group, subgroup).
"""

import csv
import io
import json
import pathlib
import re
import sys

import numpy as np
import resvg_py
from PIL import Image

SIZE = 64
STYLES = {  # caption word -> icon set
    "twemoji": "twemoji",
    "noto": "noto",
    "fluent": "fluent-emoji-flat",
    "openmoji": "openmoji",
    "emojione": "emojione",
    "black and white": "fluent-emoji-high-contrast",
}
GROUPS = {"animals-nature", "food-drink", "objects", "travel-places", "activities"}
DROPPED_SUBGROUPS = {  # near-duplicates of each other (clock faces, moon phases ...)
    "time",
    "sky-weather",
    "mail",
    "sound",
    "music",
    "place-map",
    "office",
    "award-medal",
    "book-paper",
    "hotel",
}


def slug(text):
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def svg(icons, name):
    while name in icons.get("aliases", {}):
        name = icons["aliases"][name]["parent"]
    icon = icons["icons"][name]
    width, height = (
        icon.get(side, icons.get(side, 16)) for side in ("width", "height")
    )
    body = icon["body"].replace("currentColor", "#222")
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" '
        'xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="0 0 {width} {height}" width="{SIZE}" height="{SIZE}">{body}</svg>'
    )


def main(modules, out):
    modules, out = pathlib.Path(modules), pathlib.Path(out)
    sets = {
        s: json.loads((modules / "@iconify-json" / p / "icons.json").read_text())
        for s, p in STYLES.items()
    }
    drawn_by_all = set.intersection(
        *({*icons["icons"], *icons.get("aliases", {})} for icons in sets.values())
    )
    catalogue = json.loads((modules / "openmoji/data/openmoji.json").read_text())
    kinds = {slug(e["annotation"]): (e["group"], e["subgroups"]) for e in catalogue}
    images, rows = [], []
    for name in sorted(drawn_by_all & kinds.keys()):
        group, subgroup = kinds[name]
        if group not in GROUPS or subgroup in DROPPED_SUBGROUPS:
            continue
        for style, icons in sets.items():
            png = bytes(resvg_py.svg_to_bytes(svg_string=svg(icons, name)))
            image = (
                Image.open(io.BytesIO(png))
                .convert("RGBA")
                .resize((SIZE, SIZE), Image.LANCZOS)
            )
            rows.append((len(rows), name.replace("-", " "), style, group, subgroup))
            images.append(np.asarray(image))
    out.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(out / "emoji64.npz", rgba=np.stack(images))
    with open(out / "metadata.csv", "w", newline="") as file:
        csv.writer(file).writerows(
            [("row", "concept", "style", "group", "subgroup"), *rows]
        )
    print(f"{len(images)} images of {len(images) // len(STYLES)} concepts")


if __name__ == "__main__":
    main(*sys.argv[1:])
