# SPDX-License-Identifier: Apache-2.0
"""docs/dependencies.md: every distribution, its licence, and what it is needed for."""

import pathlib
import platform
import re
import sys

from distributions import (
    ROOT,
    canonical,
    closure,
    installed,
    plain,
    requirements,
    split,
)

ARTWORK = ROOT / "gift_jax" / "assets" / "emoji64" / "LICENSES.md"

NEEDED = {  # what each direct dependency is for
    "absl-py": "command-line flags and the log",
    "array_record": "the files that prepared pictures lie in",
    "diffusers": "the Flax UNet, VAE and schedulers",
    "filelock": "one process at a time prepares or writes what others read",
    "flax": "modules, parameter trees and the training state",
    "grain": "batches that resume at their place",
    "huggingface_hub": "models given by a hub id",
    "importlib_resources": "TensorFlow Datasets imports it",
    "jax": "everything that is computed",
    "jinja2": "the report's page",
    "matplotlib": "the report's curves",
    "ml_collections": "config files and their overrides",
    "ml_dtypes": "bfloat16 tensors on the host",
    "numpy": "arrays on the host",
    "optax": "optimisers and schedules",
    "orbax-checkpoint": "checkpoints",
    "pillow": "pictures read, resized and written",
    "rich": "tables and progress on the terminal",
    "safetensors": "weights in diffusers folders",
    "tensorboardX": "TensorBoard events without TensorFlow",
    "tensorflow-datasets": "the embedded pictures and other prepared data sets",
    "tokenizers": "the tokenizer of a model pretrained here",
    "transformers": "Flax CLIP and its tokenizer",
    # of the extras
    "hypothesis": "tests over drawn inputs",
    "kubernetes-validate": "the schemas of what launch/gke.py writes",
    "nudenet": "the nudity metric's detector",
    "peft": "one test loads a LoRA as PyTorch's pipelines do",
    "pytest": "the tests",
    "pytest-xdist": "the tests in several processes",
    "ruff": "style and formatting",
    "scipy": "references that metrics and intervals are checked against",
    "torch": "parity with PyTorch",
}
NOT_IMPORTED = {  # by gift_jax, though a plain install asks for them
    "array_record": "the prepared pictures are in its format, and the packages that "
    "read and write it ask for it on some systems only",
    "importlib_resources": "TensorFlow Datasets imports it without asking for it",
}
EXTRAS = {
    "cuda12": "JAX on NVIDIA GPUs. Brings NVIDIA's libraries, under NVIDIA's terms.",
    "cuda13": "The same for drivers that know CUDA 13 (580 and newer).",
    "tpu": "JAX on Cloud TPUs. Brings libtpu, under Google's terms.",
    "nudity": "The metric `nudity`; nothing else of gift_jax needs it.",
    "test": "What the tests and the linter need, with the extra `nudity`.",
}
_MPL = (
    "Mozilla Public License 2.0: who changes its files and passes them on has to "
    "publish the changed files. gift_jax contains none of them."
)
FLAGGED = {  # licences that ask for more than a notice, and what that means here
    "certifi": _MPL,
    "hypothesis": _MPL + " For the tests alone.",
    "tqdm": _MPL,
    "ml-dtypes": "Eigen is compiled in. " + _MPL,
    "nudenet": "Its metadata say MIT, but the licence file in its wheel is the GNU "
    "Affero General Public License 3: take it to be that. It is not installed by "
    "default, no part of it is in gift_jax, and only the metric `nudity` imports it. "
    "Whoever passes on a work that contains it, or lets others use a changed one over "
    "a network, has to offer them the whole work's source under that licence.",
}
_PERMISSIVE = re.compile(
    r"0BSD|AFL-|Apache\b|3-Clause BSD|BSD\b|BSL-1\.0|CC0-1\.0|CNRI-Python|HPND|ISC\b|"
    r"MIT\b|PSF-|Python Software Foundation|The Unlicense|Unlicense|Zlib"
)
_FILE = "a licence file in it"
_COPYLEFT = re.compile(
    r"GNU (AFFERO |LESSER )?GENERAL PUBLIC LICENSE|Mozilla Public License"
)


def licence(dist) -> str:
    """Returns the licence in the metadata's words, and a licence file's if another."""
    meta = dist.metadata
    words = (meta.get("License") or "").strip()
    classes = [
        c for c in meta.get_all("Classifier") or [] if c.startswith("License ::")
    ]
    said = meta.get("License-Expression") or (words if len(words) < 40 else "")
    said = said or ", ".join(c.rsplit(" :: ", 1)[1] for c in classes)
    said = said or words.partition("\n")[0].strip()[:60] or "not said"
    for path in dist.files or ():
        ours = path.parts[0].endswith(".dist-info") and path.locate().is_file()
        if ours and re.match(r"LICEN[CS]E|COPYING", path.name):
            text = path.locate().read_text("utf-8", "replace").lstrip()
            title = _COPYLEFT.match(text.partition("\n")[0])
            if title and permissive(said):
                said += f"; {_FILE}: {title[0].title().replace('Gnu', 'GNU')}"
    return said


def permissive(said: str) -> bool:
    """Says whether every part joined by AND, or one of those joined by OR, is."""
    return _FILE not in said and all(
        any(_PERMISSIVE.match(one.strip(" ()")) for one in part.split(" OR "))
        for part in re.split(r" AND |, ", said)
    )


def unexplained(names) -> list[str]:
    """Returns those whose licence is not permissive and that FLAGGED does not have."""
    said = {n: licence(installed(n)) for n in sorted(names) if installed(n)}
    return [
        f"{name}: {words}"
        for name, words in said.items()
        if name not in FLAGGED and not permissive(words)
    ]


def _row(*cells) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"


def _table(*head) -> str:
    return _row(*head) + _row(*["---"] * len(head))


def _described(name: str) -> tuple[str, str]:
    """Returns the cells of version and licence."""
    dist = installed(name)
    if not dist:
        return "no", "not known here"
    flag = " ([more](#licences-that-ask-for-more))" if name in FLAGGED else ""
    return dist.version, licence(dist) + flag


def _direct(lines: list[str]) -> str:
    rows = _table("distribution", "range", "installed", "licence", "what for")
    for name, wanted in map(split, lines):
        cells = _described(canonical(name))
        rows += _row(name, wanted or "any", *cells, NEEDED[name])
    return rows


def _indirect(names: dict[str, set[str]]) -> str:
    rows = _table("distribution", "installed", "licence", "wanted by")
    for name, by in sorted(names.items()):
        by = sorted(by)
        others = f" and {len(by) - 3} more" if len(by) > 3 else ""
        rows += _row(name, *_described(name), ", ".join(by[:3]) + others)
    return rows


def _extra(extra: str, base: dict) -> str:
    lines = requirements(extra)
    text = f"\n### gift-jax[{extra}]\n\n{EXTRAS[extra]}"
    if [split(line)[0] for line in lines] == ["jax"]:
        return text + f" Asks for `{lines[0]}`.\n"
    direct = {canonical(split(line)[0]) for line in lines}
    more = {
        name: by
        for name, by in closure(lines).items()
        if name not in base and name not in direct
    }
    return text + "\n\n" + _direct(lines) + ("\n" + _indirect(more) if more else "")


def document() -> str:
    """Returns docs/dependencies.md for what is installed here."""
    base, lines = plain(), requirements()
    direct = {canonical(split(line)[0]) for line in lines}
    text = _HEAD.format(
        python=".".join(platform.python_version_tuple()[:2]),
        system=f"{platform.system()} {platform.machine()}",
        count=len(base),
        first=len(direct),
    )
    text += "\n## What gift_jax asks for\n\n" + _direct(lines)
    text += "\ngift_jax itself does not import "
    text += ", nor ".join(f"{name} ({why})" for name, why in NOT_IMPORTED.items())
    text += ".\n\n## What that brings\n\n"
    text += _indirect({name: by for name, by in base.items() if name not in direct})
    text += "\n## Extras\n\nNone is installed unless it is asked for.\n"
    text += "".join(_extra(extra, base) for extra in EXTRAS)
    text += "\n## Licences that ask for more\n\n"
    text += "".join(f"- **{name}**: {what}\n" for name, what in FLAGGED.items())
    table = re.search(r"(?m)^\|.*(?:\n\|.*)+\n", ARTWORK.read_text("utf-8"))[0]
    return text + _ASSETS + table


_HEAD = """\
# Dependencies

Written by `python tests/dependencies inventory`: change that, not this. Versions are
those installed where it last ran (Python {python}, {system}), licences in their
metadata's words. A plain install brings {count} distributions, of which gift_jax asks
for {first}.

    python tests/dependencies audit   # known vulnerabilities of a plain install
    python tests/dependencies sets    # tests on the oldest and the newest versions

`audit` asks pip-audit. It ends with 1 if it finds something that
[known_vulnerabilities.toml](../tests/dependencies/known_vulnerabilities.toml) does not
explain, and with 69 if it cannot ask. `sets` makes two environments in a temporary
folder, with the oldest versions that the ranges below allow and with the newest, and
runs a part of the tests in each (`--all`: all of them; `--torch`: those that need
PyTorch, too). The ranges begin where that passes.
"""
_ASSETS = """
## Artwork and weights in the package

The pictures in `gift_jax/assets/emoji64` keep their makers' licences
([LICENSES.md](../gift_jax/assets/emoji64/LICENSES.md)); emoji-sd and its judge were
trained on them ([emoji_sd.md](emoji_sd.md)). CC BY asks to name the makers; CC BY-SA
asks besides to pass on what is made of the pictures under the same licence.

"""


def run(args) -> int:
    base = plain()
    if bad := unexplained({*base, *closure(requirements("test"))}):
        print("not permissive and not in FLAGGED:", *bad, sep="\n  ", file=sys.stderr)
        return 1
    out = pathlib.Path(args.out)
    out.write_text(document(), encoding="utf-8")
    print(f"{len(base)} distributions; written: {out}")
    return 0
