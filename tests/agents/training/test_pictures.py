import base64
import io

import numpy as np
import torch
from PIL import Image

from agents.training.pictures import data_uri, grid, rows


def test_a_grid_has_its_pictures_in_order(tmp_path):
    images = torch.zeros(4, 2, 3, 3, dtype=torch.uint8)
    images[:, :, :, 0] = torch.tensor([10, 20, 30, 40])[:, None, None]
    grid(images, 2, tmp_path / "grid.png", scale=1)
    sheet = np.asarray(Image.open(tmp_path / "grid.png"))
    assert sheet.shape == (5, 7, 3)
    assert [sheet[0, 0, 0], sheet[0, 4, 0], sheet[3, 0, 0], sheet[3, 4, 0]] == [10, 20, 30, 40]


def test_a_grids_rows_come_back_whole(tmp_path):
    images = torch.arange(6, dtype=torch.uint8)[:, None, None, None].expand(6, 32, 16, 3) * 40
    grid(images, 2, tmp_path / "grid.png")
    assert [row.size for row in rows(tmp_path / "grid.png", 3)] == [(2 * 32 + 1, 64)] * 3
    seen = [sorted({p[0] for _, p in row.getcolors()} - {255}) for row in rows(tmp_path / "grid.png", 3)]
    assert seen == [[0, 40], [80, 120], [160, 200]]


def test_a_wide_picture_is_shrunk_for_a_page():
    small, wide = data_uri(Image.new("RGB", (100, 50))), data_uri(Image.new("RGB", (4000, 500)))
    assert small.startswith("data:image/png;base64,")
    assert Image.open(io.BytesIO(base64.b64decode(wide.partition(",")[2]))).size == (1040, 130)
