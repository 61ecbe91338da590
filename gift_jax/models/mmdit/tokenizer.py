# SPDX-License-Identifier: Apache-2.0
"""The tokenizer of T5, Stable Diffusion 3's third."""

from pathlib import Path
from typing import Any

from gift_jax.models import safetensors_io
from gift_jax.runtime.errors import UserError, one_line, shown

_FILE = "tokenizer.json"
_COPY = "copy it again from the base model"


def load_t5_tokenizer(directory) -> Any:
    """Returns transformers' fast T5Tokenizer of a folder.

    Its words are in tokenizer.json. spiece.model, which needs another library, is not
    read.

    Raises: UserError naming the file that is missing or damaged.
    """
    folder = Path(directory)
    file = folder / _FILE
    if not file.exists() and (folder / "spiece.model").exists():
        raise UserError(
            f"{one_line(folder)}: has spiece.model and no {_FILE}, which alone is read;"
            f" copy {_FILE} from the base model, or write it with transformers: "
            "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
        )
    content = safetensors_io.read_json(file)
    model = content.get("model")
    kind = model.get("type") if isinstance(model, dict) else None
    if kind != "Unigram":
        raise UserError(
            f"{one_line(file)}: the model's type is {shown(kind)}; must be Unigram, as "
            f"T5's is; {_COPY}"
        )
    from transformers import T5TokenizerFast  # a second, which --help need not wait

    try:
        return T5TokenizerFast.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # its parsers raise whatever a value leads to
        raise UserError(
            f"{one_line(folder)}: transformers cannot read the tokenizer "
            f"({one_line(error)}); copy its files again from the base model"
        ) from error
