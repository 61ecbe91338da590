# SPDX-License-Identifier: Apache-2.0
"""Picture grids."""

import numpy as np
import pytest
from PIL import Image

from gift_jax.sampling import grid


def colors(n):
    return np.stack([np.full((8, 8, 3), 20 * i, np.uint8) for i in range(n)])


def pixels(file):
    with Image.open(file) as image:
        return np.asarray(image)


def test_grid_places_pictures_row_by_row(tmp_path):
    path = grid.save_grid(colors(5), tmp_path / "new" / "grid.png", columns=3, cell=16)
    page = pixels(path)
    assert page.shape == (2 * 20, 3 * 20, 3)
    for i in range(5):
        row, column = divmod(i, 3)
        cell = page[row * 20 : row * 20 + 16, column * 20 : column * 20 + 16]
        assert (cell == 20 * i).all()
    assert (page[20:, 40:] == 255).all()  # the empty place


def test_grid_makes_room_for_labels(tmp_path):
    rows = [colors(2), colors(1)]
    labels = {"row_labels": ["original", "immunized"], "column_labels": ["a b", "c"]}
    plain = pixels(grid.save_grid(rows, tmp_path / "a.png"))
    page = pixels(grid.save_grid(rows, tmp_path / "b.png", **labels))
    top, left = page.shape[0] - plain.shape[0], page.shape[1] - plain.shape[1]
    assert top > 10 and left > 40
    np.testing.assert_array_equal(page[top:, left:], plain)
    assert (page[top:, :left] < 100).any() and (page[:top, left:] < 100).any()


def test_grid_without_pictures_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no images"):
        grid.save_grid([[], []], tmp_path / "a.png")
