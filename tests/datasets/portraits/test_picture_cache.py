"""Pictures drawn once: mapped, resumed after an interruption, and drawn anew when what decides them changes."""

import numpy as np
import pytest
import torch

from diffusion_opt.datasets import CorruptFileError
from diffusion_opt.datasets.portraits import draw, picture_cache, pictures, sample


@pytest.fixture
def counted(monkeypatch):
    """Blocks of four pictures, and a list of what was drawn; `limit` interrupts the drawing."""
    calls, limit = [], [10**9]

    def draw_counted(portrait, size=128):
        if len(calls) >= limit[0]:
            raise KeyboardInterrupt
        calls.append(portrait)
        return draw(portrait, size)

    monkeypatch.setattr(picture_cache, "_BLOCK", 4)
    monkeypatch.setattr(picture_cache, "draw", draw_counted)
    return calls, limit


def test_pictures_are_those_of_the_sample_and_drawn_once(tmp_path, counted):
    calls, _ = counted
    first = pictures(9, 2, "test", tmp_path, size=24)
    assert first.shape == (9, 3, 24, 24) and first.dtype == torch.uint8
    assert all(torch.equal(a, draw(p, 24)) for a, p in zip(first, sample(9, 2, "test"), strict=True))
    assert torch.equal(pictures(9, 2, "test", tmp_path, size=24), first) and len(calls) == 9


def test_an_interrupted_run_goes_on_at_the_last_whole_block(tmp_path, counted):
    calls, limit = counted
    limit[0] = 6
    with pytest.raises(KeyboardInterrupt):
        pictures(11, 0, "train", tmp_path, size=24)
    assert not list(tmp_path.glob("*.npy"))
    limit[0], before = 10**9, len(calls)
    resumed = pictures(11, 0, "train", tmp_path, size=24)
    assert len(calls) - before == 7  # four were kept
    assert all(torch.equal(a, draw(p, 24)) for a, p in zip(resumed, sample(11, 0), strict=True))
    assert [path.suffix for path in tmp_path.iterdir() if path.name.startswith("portraits")] == [".npy"]


def test_writing_to_the_tensor_leaves_the_file_alone(tmp_path):
    first = pictures(3, 1, "train", tmp_path, size=16)
    kept = first.clone()
    first.zero_()
    assert torch.equal(pictures(3, 1, "train", tmp_path, size=16), kept)


def test_another_size_or_split_is_another_file(tmp_path):
    pictures(2, 0, "train", tmp_path, size=16)
    pictures(2, 0, "train", tmp_path, size=24)
    pictures(2, 0, "held_out", tmp_path, size=16)
    assert len(list(tmp_path.glob("*.npy"))) == 3


def test_a_file_of_another_shape_is_refused(tmp_path):
    pictures(2, 0, "train", tmp_path, size=16)
    (path,) = tmp_path.glob("*.npy")
    np.save(path, np.zeros((1, 3, 16, 16), np.uint8))
    with pytest.raises(CorruptFileError, match="remove it, it is drawn again"):
        pictures(2, 0, "train", tmp_path, size=16)
