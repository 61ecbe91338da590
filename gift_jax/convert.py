# SPDX-License-Identifier: Apache-2.0
"""Converts diffusers folders, Orbax checkpoints and single files; merges LoRA.

    python -m gift_jax.convert to-diffusers   --checkpoint runs/gift/checkpoints --out DIR
    python -m gift_jax.convert to-unet-state  --checkpoint runs/gift/checkpoints --out changed.safetensors
    python -m gift_jax.convert from-diffusers --model DIR_OR_HUB_ID --out CKPT
    python -m gift_jax.convert to-diffusers   --checkpoint CKPT --out DIR
    python -m gift_jax.convert merge-lora     --model DIR_OR_HUB_ID --lora FILE:SCALE --out DIR
    python -m gift_jax.convert rename-lora    --model DIR_OR_HUB_ID --lora FILE --names kohya --out FILE
    python -m gift_jax.convert from-single-file FILE --out DIR
    python -m gift_jax.convert to-single-file --model DIR_OR_HUB_ID --out FILE
    python -m gift_jax.convert verify         --model DIR_OR_HUB_ID

A run's checkpoints hold what it trained; the rest comes from the model it started from,
whose content must still be what it was. A checkpoint made by from-diffusers holds the
whole model, and to-diffusers gives back every tensor byte for byte. merge-lora leaves
the tensors that no LoRA changes as they are; rename-lora wants the model since only its
modules' names tell what kohya's underscores stand for.

A single file is a whole Stable Diffusion 1, 2 or XL in one .safetensors by its original
names. It holds no tokenizer: that comes from --tokenizer.

verify has PyTorch's diffusers load a model, compares every tensor with the files, and
draws one picture here and there; exit code 1 if they differ.
"""  # noqa: E501 - commands to copy

import argparse
import pathlib

from absl import logging
from ml_collections import ConfigDict

from gift_jax import attack, train
from gift_jax.attacks import base as attacks_base
from gift_jax.defenses import base as defenses_base
from gift_jax.models import exports, model_card, safetensors_io, weights
from gift_jax.models import orbax as orbax_model
from gift_jax.models.folder import ModelFolder, existing
from gift_jax.models.load import family_of, model_folder, read_adapters
from gift_jax.models.sd import lora_files
from gift_jax.models.sd.adapters import AdapterFiles, read_lora
from gift_jax.models.sd.single_file import from_file, to_file
from gift_jax.models.sd.single_file.families import PREDICTIONS
from gift_jax.models.trainable import select_trainable
from gift_jax.runtime import cli, config, files
from gift_jax.runtime.devices import init_jax
from gift_jax.runtime.errors import UserError
from gift_jax.runtime.workdir import phase_folders
from gift_jax.sampling import verification
from gift_jax.training import checkpoint, setup

DTYPES = {"fp32": "F32", "fp16": "F16", "bf16": "BF16"}


def from_diffusers(args) -> None:
    """Writes a diffusers folder as an Orbax checkpoint of the whole model."""
    _check_new(args.out)
    folder = model_folder(args.model, args.revision, args.variant)
    if not folder.is_dir():
        raise UserError(f"--model={args.model!r}: no such folder")
    dtype = DTYPES.get(args.dtype)
    orbax_model.save(folder, args.out, variant=args.variant, dtype=dtype)
    logging.info("wrote the Orbax checkpoint %s", args.out)


def to_diffusers(args) -> None:
    """Writes a diffusers folder from a run's checkpoints or a whole-model one."""
    _check_new(args.out)
    dtype = DTYPES.get(args.dtype)
    if orbax_model.is_model_checkpoint(args.checkpoint):
        for flag in ("step", "base"):
            if getattr(args, flag) is not None:
                raise UserError(
                    f"--{flag} is for a run's checkpoints; {args.checkpoint} is a "
                    "whole model: leave it out"
                )
        orbax_model.restore(args.checkpoint, args.out, dtype=dtype)
    else:
        run = Run(args.checkpoint, args.step, args.base)
        exports.export(
            run.base,
            run.changed,
            args.out,
            run.variant,
            dtype,
            run.tokenizer,
            model_card.of_run(run.workdir, run.base_folder, run.summary, args.step),
        )
    logging.info("wrote the model folder %s", args.out)


def to_unet_state(args) -> None:
    """Writes the tensors that a run changed, by their diffusers names, in one file."""
    _check_new_safetensors(args.out)
    run, dtype = Run(args.checkpoint, args.step, args.base), DTYPES.get(args.dtype)
    denoiser = weights.DENOISERS[run.base_folder.denoiser_component]
    _, text = weights.network_and_text(run.changed)
    if any(text.values()):
        raise UserError(
            f"--checkpoint={args.checkpoint}: this run changed the text encoder; "
            f"its {denoiser} alone would not draw alike: use to-diffusers"
        )
    entries = run.base_entries()
    table = {}
    for path, array in sorted(run.changed.items()):
        name, entry = entries[path]
        ours = exports.in_torch_layout(path, array, name, entry)
        as_base = safetensors_io.cast(name, ours, entry.dtype)
        if as_base.tobytes() == safetensors_io.read_tensor(name, entry).tobytes():
            continue
        ours = safetensors_io.cast(name, ours, dtype or entry.dtype)
        table[name] = dtype or entry.dtype, ours.shape, lambda ours=ours: ours
    if not table:
        raise UserError(
            f"--checkpoint={args.checkpoint}: step {run.step} differs in no tensor "
            f"from {run.base}"
        )
    notes = {"format": "pt", "base_sha256": run.base_sha256, "step": str(run.step)}
    with files.atomic_write(args.out) as aside:
        safetensors_io.write_file(aside, table, notes)
    logging.info("wrote %d of the %s's tensors to %s", len(table), denoiser, args.out)


def merge_lora(args) -> None:
    """Writes a diffusers folder with LoRA files merged into its weights."""
    _check_new(args.out)
    root = existing(model_folder(args.model, args.revision, args.variant))
    adapters = read_adapters(AdapterFiles(lora=tuple(args.lora)), root, args.variant)
    folder = ModelFolder(root, args.variant, adapters)
    exports.export(
        root,
        folder.adapted_params(),
        args.out,
        args.variant,
        DTYPES.get(args.dtype),
        readme=model_card.of_merged(args.model, folder),
    )
    logging.info("wrote the model folder %s", args.out)


def rename_lora(args) -> None:
    """Writes a LoRA file by other names."""
    _check_new_safetensors(args.out)
    root = existing(model_folder(args.model, args.revision, args.variant))
    layers = read_lora(args.lora, root, args.variant)
    lora_files.write(args.out, layers, args.names, DTYPES.get(args.dtype, "F32"))
    logging.info("wrote the updates of %d layers to %s", len(layers), args.out)


def from_single_file(args) -> None:
    """Writes a single file as a diffusers folder."""
    _check_new(args.out)
    options = from_file.Options(
        tokenizer=args.tokenizer,
        vae=args.vae,
        prediction=args.prediction,
        ema=args.ema,
        dtype=DTYPES.get(args.dtype),
    )
    from_file.convert(args.file, args.out, options)
    logging.info("wrote the model folder %s", args.out)


def to_single_file(args) -> None:
    """Writes a diffusers folder as a single file."""
    _check_new_safetensors(args.out)
    folder = model_folder(args.model, args.revision, args.variant)
    dtype = DTYPES.get(args.dtype)
    to_file.convert(folder, args.out, variant=args.variant, dtype=dtype)
    logging.info("wrote %s", args.out)


def verify(args) -> None:
    """Prints whether PyTorch loads and draws a model as gift_jax does."""
    if args.steps < 1:
        raise UserError(f"--steps={args.steps} must be at least 1")
    init_jax()
    line = verification.verify(
        args.model,
        AdapterFiles(lora=tuple(args.lora), textual_inversion=tuple(args.embeddings)),
        revision=args.revision,
        variant=args.variant,
        picture=verification.Picture(args.prompt, args.steps) if args.picture else None,
        without="--no-picture",
    )
    print(line)


class Run:
    """What a run's checkpoint changed, and in which model.

    Attributes: workdir: the run's folder. base: the model folder that it started from;
      variant: of its files; base_folder: with the files that the run added to it.
      base_sha256: its content. step: of the checkpoint. changed: {Flax path of the
      denoiser or the text encoder: float32 array}, LoRA factors and added files merged.
      tokenizer: with the words that the run or an added file has, or None.
    Raises: UserError if the checkpoint, the run's config or the base cannot be found,
      or the base is not what it was.
    """

    def __init__(self, checkpoints, step=None, base=None):
        folder = pathlib.Path(checkpoints)
        if not folder.is_dir():
            raise UserError(f"--checkpoint={folder}: no such folder")
        if orbax_model.is_model_checkpoint(folder):
            raise UserError(
                f"--checkpoint={folder} is a whole model, of which nothing was "
                "changed; give a run's checkpoints"
            )
        parent = folder.absolute().parent
        is_phase = not (parent / "config.json").is_file()
        self.workdir = parent.parent if is_phase else parent
        file = self.workdir / "config.json"
        if not file.is_file():
            raise UserError(
                f"--checkpoint={folder}: neither a whole-model checkpoint "
                f"({orbax_model.LAYOUT}) nor the checkpoints of a run ({file})"
            )
        cfg = _complete(safetensors_io.read_json(file))
        if "base_sha256" not in cfg:
            raise UserError(f"{file}: this run started from no model; its folder says")
        self.base, self.variant = _find_base(cfg, base), cfg["variant"]
        self.base_sha256 = cfg["base_sha256"]
        added = config.resolve_group(cfg, "adapters", AdapterFiles)
        own = read_adapters(added, self.base, self.variant) if added else None
        self.base_folder = base_folder = ModelFolder(self.base, self.variant, own)
        content = base_folder.content_hash()
        if content != self.base_sha256:
            raise UserError(
                f"{self.base}: its content ({content[:12]}) is not what the run "
                f"started from ({self.base_sha256[:12]}); name that model with --base"
            )
        phases = phase_folders(parent) if step is None else []
        if phases:
            folder = phases[-1] / "checkpoints"
            logging.info("--checkpoint: of the run's last phase, %s", folder)
        self.step, params = checkpoint.read_params(folder, step)
        command = {"train": train, "attack": attack}[cfg["kind"]]
        run = command.resolve(cfg, with_data=False)
        self.summary, self.tokenizer = command.summary(run), None
        if command is attack:
            method = attacks_base.load(run.attack)
            self.changed = method.changed(run.settings, base_folder, params)
            self.tokenizer = method.tokenizer(run.settings, base_folder)
        else:
            method = defenses_base.load(run.method)
            paths = [path for path in params if path in self.base_entries()]
            sets = family_of(self.base).trainable_sets
            selected = select_trainable(dict.fromkeys(paths), run.trainable, sets)[0]
            self.changed = method.exported(params, tuple(selected))
            self._check_shapes(folder)
        self.changed = base_folder.adapted_params() | self.changed
        self.tokenizer = self.tokenizer or base_folder.added_tokenizer()

    def _check_shapes(self, folder):
        """Raises UserError if a phase trained another network, such as a detector."""
        entries = self.base_entries()
        try:
            for path, array in self.changed.items():
                exports.in_torch_layout(path, array, *entries[path])
        except UserError as error:
            raise UserError(
                f"--checkpoint={folder}: {error}; of a later phase the checkpoints "
                "are in RUN/PHASE/checkpoints"
            ) from None

    def base_entries(self):
        """Returns {Flax path: (name, entry)} of the base's denoiser."""
        denoiser = self.base_folder.denoiser_component
        return weights.entries_by_path(self.base / denoiser, denoiser, self.variant)


def _complete(cfg):
    """Returns a config.json's content with the groups that it leaves out."""
    cfg = ConfigDict(cfg)
    if "hardware" in cfg and "processes" not in cfg.hardware:
        cfg.hardware.processes = config.to_config(setup.Processes)
    if "adapters" not in cfg:  # of an older run
        cfg.adapters = config.to_config(AdapterFiles)
    if "verify" not in cfg:
        cfg.verify = "off"
    return cfg


def _find_base(cfg, base):
    if base is not None:
        folder, name = pathlib.Path(base), f"--base={base}"
    else:
        folder = model_folder(cfg["model"], cfg["revision"], cfg["variant"])
        name = f"the run's model {cfg['model']!r}"
    if not (folder / "model_index.json").is_file():
        raise UserError(f"{name} is no model folder here; name it with --base")
    return folder


def _check_new(out: pathlib.Path) -> None:
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise UserError(f"--out={out} exists; choose another, or delete it first")


def _check_new_safetensors(out: pathlib.Path) -> None:
    if out.suffix != ".safetensors":
        raise UserError(f"--out={out} must end in .safetensors")
    _check_new(out)


def _parser():
    flags = cli.parser(__doc__, "convert")
    commands = flags.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def subcommand(name, run, text, more=""):
        sub = commands.add_parser(
            name, help=text, description=text + more, allow_abbrev=False
        )
        sub.set_defaults(run=run)
        return sub

    def command(name, run, text):
        sub = subcommand(name, run, text)
        sub.add_argument("--out", type=pathlib.Path, required=True, help="must be new")
        sub.add_argument(
            "--dtype", choices=tuple(DTYPES), help="of the weights (default: as it is)"
        )
        return sub

    def from_model(name, run, text):
        sub = command(name, run, text)
        _add_model(sub)
        return sub

    from_model(
        "from-diffusers", from_diffusers, "a diffusers folder to an Orbax checkpoint"
    )
    sub = from_model("merge-lora", merge_lora, "a diffusers folder with LoRA merged")
    sub.add_argument(
        "--lora",
        action="append",
        required=True,
        help="FILE[:SCALE], by the names of diffusers, peft or kohya; repeatable",
    )
    sub = from_model("rename-lora", rename_lora, "a LoRA file by other names")
    sub.add_argument("--lora", required=True, help="FILE, made for that model")
    sub.add_argument(
        "--names", choices=lora_files.WRITTEN, required=True, help="to write"
    )
    from_model("to-single-file", to_single_file, "a diffusers folder to a single file")
    _add_single_file(
        command("from-single-file", from_single_file, "a single file to a folder")
    )
    for name, run, text in (
        ("to-diffusers", to_diffusers, "an Orbax checkpoint to a diffusers folder"),
        (
            "to-unet-state",
            to_unet_state,
            "the UNet tensors that a run changed, in one safetensors file",
        ),
    ):
        sub = command(name, run, text)
        sub.add_argument(
            "--checkpoint",
            type=pathlib.Path,
            required=True,
            help="RUN/checkpoints, or what from-diffusers wrote",
        )
        sub.add_argument("--step", type=int, help="of a run (default: the newest)")
        sub.add_argument("--base", help="where the run's base model lies now")
    _add_verify(subcommand("verify", verify, *_VERIFY))
    return flags


_VERIFY = (
    "whether PyTorch's diffusers loads and draws a model as gift_jax does",
    ". Needs pip install '.[torch]', and memory for the weights in float32, "
    "once: 4.3 GB for Stable Diffusion 1.5, 14 GB for SDXL, and what drawing takes. "
    "Exit code 0: the pictures agree; 1: one line says what does not.",
)


def _add_verify(sub):
    _add_model(sub)
    add = sub.add_argument
    for name, dest, meaning in (
        ("--lora", "lora", "FILE[:SCALE], a LoRA to add"),
        ("--textual-inversion", "embeddings", "FILE[:TOKEN], learned embeddings"),
    ):
        text = f"{meaning}; every tensor must arrive; repeatable"
        add(name, dest=dest, action="append", default=[], help=text)
    add("--prompt", default="", help="(default: a dog, and the words of embeddings)")
    add("--steps", type=int, default=2, help="of drawing (default %(default)s)")
    add(
        "--picture",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="draw one on both sides",
    )


def _add_model(sub):
    add = sub.add_argument
    add("--model", required=True, help="a diffusers folder, hub id or single file")
    add("--revision", default="", help="of a hub id")
    add("--variant", default="", help="of the weight files, such as fp16")


def _add_single_file(sub):
    sub.add_argument(
        "file", type=pathlib.Path, metavar="FILE", help="a whole model's .safetensors"
    )
    sub.add_argument(
        "--tokenizer",
        default="",
        help="the folder or hub id of a model with CLIP's (default: the base model's)",
    )
    sub.add_argument(
        "--vae", default="", help="a folder or hub id of a VAE in place of the file's"
    )
    sub.add_argument(
        "--prediction",
        default="",
        choices=PREDICTIONS,
        help="of the UNet (default: what the file says, else epsilon; not for 2.x)",
    )
    sub.add_argument(
        "--ema", action="store_true", help="take the UNet's running averages"
    )


def main(argv: list[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    args.run(args)
    return 0


if __name__ == "__main__":
    cli.run_main(main)
