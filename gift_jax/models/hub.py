# SPDX-License-Identifier: Apache-2.0
"""Model folders by hub id: only what is read is fetched, and never a pickle."""

import re
from collections.abc import Sequence
from pathlib import Path

from absl import logging

from gift_jax.runtime.errors import UserError

_ID = re.compile(r"[\w.-]+/[\w.-]+")
_WANTED = ("model_index.json", "README.md", "LICENSE*")
_WANTED += ("*/*.json", "*/*.txt", "*/*.safetensors")


def is_id(name: str) -> bool:
    """Whether a model's name has the form of a hub id, "org/name"."""
    return bool(_ID.fullmatch(name)) and not name.startswith((".", "/"))


def commit(folder: Path) -> str:
    """Returns the commit that a folder of `fetch` is of, 40 hex digits, or ""."""
    return folder.name if re.fullmatch("[0-9a-f]{40}", folder.name) else ""


def fetch(
    name: str,
    revision: str = "",
    variant: str = "",
    *,
    wanted: Sequence[str] = _WANTED,
    field: str = "config.model",
) -> Path:
    """Returns the local folder of a hub model, downloading what is not cached.

    Args: revision: branch, tag or commit; "" is the default branch. variant: whose
      weights to fetch; "" the plain ones. wanted: patterns of the files to fetch.
      field: what asked for the model, to begin an error's message with.
    Raises: UserError if the model or revision does not exist, is gated, or the hub
      cannot be reached and the cache lacks it.
    """
    import huggingface_hub
    from huggingface_hub import errors

    marked = ("*.fp16.*", "*.fp16-*", "*.bf16.*", "*.non_ema.*", "*.index.fp16.json")
    try:
        folder = huggingface_hub.snapshot_download(
            name,
            revision=revision or None,
            allow_patterns=list(wanted),
            ignore_patterns=None if variant else list(marked),
        )
    except errors.GatedRepoError:
        reason = "its license must be accepted first; then log in (hf auth login)"
    except errors.RevisionNotFoundError:
        reason = f"has no revision {revision!r}; name a branch, tag or commit"
    except errors.RepositoryNotFoundError:
        reason = "neither a folder here nor a public model on the hub; check the name"
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled):
        reason = "no such folder, not in the hub's cache, and the hub is out of reach"
    except (errors.HfHubHTTPError, OSError) as error:  # requests' too are OSErrors
        said = str(error).strip() or type(error).__name__
        reason = f"the hub failed ({said.splitlines()[0]}); try again"
    else:
        logging.info("model %s is at %s", name, folder)
        return Path(folder)
    raise UserError(f"{field}={name!r}: {reason}")
