import base64
import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from agents.training import pictures
from agents.training.pictures import check_picture, data_uri, film, gif, grid, read_frames, rows


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
    assert [row.size for (row,) in rows(tmp_path / "grid.png", 3)] == [(2 * 32 + 1, 64)] * 3
    seen = [sorted({p[0] for _, p in row.getcolors()} - {255}) for (row,) in rows(tmp_path / "grid.png", 3)]
    assert seen == [[0, 40], [80, 120], [160, 200]]


def test_a_wide_picture_is_shrunk_for_a_page():
    small, wide = data_uri([Image.new("RGB", (100, 50))]), data_uri([Image.new("RGB", (4000, 500))])
    assert small.startswith("data:image/png;base64,")
    assert Image.open(io.BytesIO(base64.b64decode(wide.partition(",")[2]))).size == (1040, 130)


# --- Clips ---


def clips(count=6, frames=5):
    """Every frame of every clip has a grey of its own."""
    shade = torch.arange(count * frames, dtype=torch.uint8).view(count, frames) * 8
    return shade[:, :, None, None, None].expand(count, frames, 32, 16, 3)


@pytest.mark.parametrize("ending", [".webp", ".png"])
def test_clips_move_and_keep_their_values(tmp_path, ending):
    path = tmp_path / f"grid{ending}"
    grid(clips(), 2, path, scale=1, frame_rate=4)
    found = read_frames(path)
    assert len(found) == 5
    for i, frame in enumerate(found):
        pixels = np.asarray(frame)
        assert pixels.shape == (3 * 33 - 1, 2 * 17 - 1, 3)
        assert [pixels[33 * (n // 2), 17 * (n % 2), 0] for n in range(6)] == [8 * (5 * n + i) for n in range(6)]
        assert frame.info["duration"] == 250
    assert [len(row) for row in rows(path, 3)] == [5, 5, 5]
    assert [frame.getpixel((0, 0))[0] for frame in rows(path, 3)[1]] == [80, 88, 96, 104, 112]


def test_a_gif_has_all_frames(tmp_path):
    grid(clips(), 2, tmp_path / "grid.gif", scale=1)
    assert len(read_frames(tmp_path / "grid.gif")) == 5
    grid(clips(), 2, tmp_path / "grid.webp", scale=1, frame_rate=4)
    found = Image.open(io.BytesIO(gif(read_frames(tmp_path / "grid.webp"))))
    assert (found.n_frames, found.info["duration"], found.info["loop"]) == (5, 250, 0)


def test_an_mp4_plays(tmp_path):
    from moviepy import VideoFileClip

    grid(clips(), 2, tmp_path / "grid.mp4", scale=1, frame_rate=4)
    with VideoFileClip(str(tmp_path / "grid.mp4")) as film:
        assert (film.fps, film.duration, film.size) == (4, 1.25, [34, 98])


@pytest.mark.parametrize(
    ("name", "shows", "message"),
    [
        ("a.jpg", "clips", r"cannot hold clips: a file that moves ends in one of \['.webp', '.gif', '.png', '.mp4'\]"),
        ("a.mp4", "images", r"is for clips, and these are images: let it end in \.png"),
    ],
)
def test_a_file_that_cannot_hold_what_it_shows(name, shows, message):
    with pytest.raises(ValueError, match=message):
        check_picture(Path(name), shows)


def test_an_mp4_needs_a_package(monkeypatch):
    monkeypatch.setattr(pictures.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'denoise-env\[video\]'"):
        check_picture(Path("a.mp4"), "clips")


def test_a_film_shows_frames_downwards_and_of_many_some(tmp_path):
    grid(clips(2, 5), 2, tmp_path / "grid.webp", scale=1)
    sheet = film(read_frames(tmp_path / "grid.webp"))
    assert sheet.size == (33, 5 * 33 - 1)
    assert [sheet.getpixel((0, 33 * i))[0] for i in range(5)] == [0, 8, 16, 24, 32]
    assert film([Image.new("L", (3, 2), i) for i in range(11)]).size == (3, 6 * 3 - 1)


def test_a_page_has_a_moving_picture():
    frames = [Image.new("RGB", (1300, 100), (i, 0, 0)) for i in range(3)]
    shown = data_uri(frames)
    assert shown.startswith("data:image/webp;base64,")
    found = Image.open(io.BytesIO(base64.b64decode(shown.partition(",")[2])))
    assert (found.n_frames, found.size) == (3, (1040, 80))
