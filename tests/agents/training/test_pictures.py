import numpy as np
import torch
from PIL import Image

from agents.training.pictures import grid


def test_a_grid_has_its_pictures_in_order(tmp_path):
    images = torch.zeros(4, 2, 3, 3, dtype=torch.uint8)
    images[:, :, :, 0] = torch.tensor([10, 20, 30, 40])[:, None, None]
    grid(images, 2, tmp_path / "grid.png", scale=1)
    sheet = np.asarray(Image.open(tmp_path / "grid.png"))
    assert sheet.shape == (5, 7, 3)
    assert [sheet[0, 0, 0], sheet[0, 4, 0], sheet[3, 0, 0], sheet[3, 4, 0]] == [10, 20, 30, 40]
