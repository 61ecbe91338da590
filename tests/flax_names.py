# SPDX-License-Identifier: Apache-2.0
"""What Flax calls a module of PyTorch's."""


def flax_name(name):
    """down_blocks.0.x as Flax calls it: down_blocks_0/x; the noise is drawn by name."""
    parts = []
    for part in name.split("."):
        if part.isdigit():
            parts[-1] += f"_{part}"
        else:
            parts.append(part)
    return "/".join(parts)
