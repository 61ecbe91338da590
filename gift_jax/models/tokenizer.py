# SPDX-License-Identifier: Apache-2.0
"""A model folder's tokenizer: the one thing that transformers is used for."""

from pathlib import Path

from gift_jax.runtime.errors import UserError


def load_tokenizer(directory):
    """Returns the CLIPTokenizer of a folder with vocab.json and merges.txt."""
    for name in ("vocab.json", "merges.txt"):
        if not (Path(directory) / name).is_file():
            raise UserError(
                f"{Path(directory) / name}: no such file; copy the tokenizer"
            )
    from transformers import CLIPTokenizer  # a second, which --help need not wait

    return CLIPTokenizer.from_pretrained(str(directory), local_files_only=True)
