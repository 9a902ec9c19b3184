"""Fashion-MNIST: the pictures everyone knows, bit for bit, and a clear word when a file is not what it claims to be."""

import gzip
import hashlib
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from diffusion_opt import names
from diffusion_opt.datasets import (
    FASHION_CLASSES,
    CorruptFileError,
    data_dir,
    load_fashion_mnist,
    read_idx,
    write_sums,
)

FIRST_LABELS = {"train": [9, 0, 0, 3, 0, 2, 7, 2, 5, 5], "test": [9, 2, 1, 1, 6, 1, 4, 6, 5, 7]}
SIZES = {"train": 60_000, "test": 10_000}
# SHA-256 of the pixels: gzip -dc …-images-idx3-ubyte.gz | tail -c +17 | sha256sum
PIXELS = {
    "train": "2e487a6c89124f78f2d7521542223cafe96f7123c3ca13d447772ac6ecbb3012",
    "test": "c867c93ff95360594e8ec3287995350b824dd110b11595c0e13d5423f621867a",
}


def write_idx(path: Path, array: np.ndarray) -> None:
    header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    path.write_bytes(gzip.compress(header + array.astype(np.uint8).tobytes()))


@pytest.fixture
def small_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data folder with six test and nine training pictures, found through DIFFUSION_OPT_DATA."""
    folder = tmp_path / "fashion-mnist"
    folder.mkdir()
    for stem, num in (("train", 9), ("t10k", 6)):
        pixels = np.random.default_rng(num).integers(0, 256, (num, 28, 28))
        write_idx(folder / f"{stem}-images-idx3-ubyte.gz", pixels)
        write_idx(folder / f"{stem}-labels-idx1-ubyte.gz", np.arange(num))
    write_sums(folder)
    monkeypatch.setenv("DIFFUSION_OPT_DATA", str(tmp_path))
    return folder


@pytest.mark.parametrize("split", SIZES)
def test_the_shipped_pictures_are_the_original_ones(split):
    data = load_fashion_mnist(split)
    assert len(data) == SIZES[split] and data.images.shape == (SIZES[split], 1, 28, 28)
    assert data.images.dtype == torch.float32 and data.labels.dtype == torch.int64
    assert data.images.aminmax() == (-1, 1)
    assert data.labels[:10].tolist() == FIRST_LABELS[split]
    assert data.labels.bincount().tolist() == [SIZES[split] // 10] * 10
    pixels = ((data.images + 1) * 127.5).round().to(torch.uint8)
    assert hashlib.sha256(pixels.numpy().tobytes()).hexdigest() == PIXELS[split]


def test_classes_by_name():
    assert len(FASHION_CLASSES) == len(set(FASHION_CLASSES)) == 10
    data = load_fashion_mnist("train")
    assert [data.class_names[i] for i in data.labels[:4]] == ["ankle boot", "t-shirt", "t-shirt", "dress"]


def test_small_pictures_are_means_of_four_pixels_in_a_frame_of_background(small_data):
    full, small = load_fashion_mnist("test").images.double(), load_fashion_mnist("test", size=16).images.double()
    assert small.shape == (6, 1, 16, 16)
    corners = full[..., 0::2, 0::2] + full[..., 0::2, 1::2] + full[..., 1::2, 0::2] + full[..., 1::2, 1::2]
    torch.testing.assert_close(small[..., 1:-1, 1:-1], corners / 4, rtol=0, atol=1e-6)
    frame = torch.ones(16, 16, dtype=torch.bool)
    frame[1:-1, 1:-1] = False
    assert (small[..., frame] == -1).all()


def test_a_caller_may_write_into_what_it_got(small_data):
    data = load_fashion_mnist("train")
    data.images.zero_()
    data.labels.zero_()
    again = load_fashion_mnist("train")
    assert again.labels.tolist() == list(range(9)) and again.images.abs().sum() > 0


@pytest.mark.wrong_shapes
def test_unknown_split_and_size(small_data):
    with pytest.raises(ValueError, match=r"split must be one of \['test', 'train'\], got 'validation'"):
        load_fashion_mnist("validation")
    with pytest.raises(ValueError, match=r"size must be 28 \(original\) or 16 .*, got 32"):
        load_fashion_mnist("test", size=32)


@pytest.mark.parametrize("name", ["t10k-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"])
@pytest.mark.parametrize("damage", ["truncated", "altered", "missing"])
def test_damaged_files_are_refused_by_name(small_data, name, damage):
    path = small_data / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(content if damage == "altered" else content[:-10])
    with pytest.raises(CorruptFileError, match=f"{name} is {'missing' if damage == 'missing' else 'damaged'}"):
        load_fashion_mnist("test")


def test_folder_without_the_data(tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFUSION_OPT_DATA", str(tmp_path))
    with pytest.raises(CorruptFileError, match="SHA256SUMS is missing"):
        load_fashion_mnist("train")


def test_data_folder_of_the_repository_or_of_the_environment(tmp_path, monkeypatch):
    monkeypatch.delenv("DIFFUSION_OPT_DATA", raising=False)
    assert data_dir() == Path(__file__).resolve().parents[2] / "data"
    monkeypatch.setenv("DIFFUSION_OPT_DATA", str(tmp_path))
    assert data_dir() == tmp_path
    monkeypatch.setenv("DIFFUSION_OPT_DATA", str(tmp_path / "none"))
    with pytest.raises(FileNotFoundError, match=r"DIFFUSION_OPT_DATA points to .*none, which is not a folder"):
        data_dir()


def test_installed_without_its_repository(tmp_path, monkeypatch):
    monkeypatch.delenv("DIFFUSION_OPT_DATA", raising=False)
    monkeypatch.setattr(names, "__file__", str(tmp_path / "a" / "names.py"))
    with pytest.raises(FileNotFoundError, match="Set DIFFUSION_OPT_DATA to that folder of a clone"):
        data_dir()


def test_idx_round_trip(tmp_path):
    array = np.arange(2 * 3 * 5).reshape(2, 3, 5)
    write_idx(tmp_path / "a.gz", array)
    assert np.array_equal(read_idx(tmp_path / "a.gz"), array)


GOOD = b"\x00\x00\x08\x02" + struct.pack(">2I", 2, 3) + bytes(6)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"\x00\x00\x0d\x02" + GOOD[4:], "not an IDX file of bytes: it starts with 00000d02"),
        (b"PNG", "not an IDX file of bytes"),
        (GOOD[:-1], r"announces shape \(2, 3\) but holds 5 bytes"),
        (GOOD + b"\x00", r"announces shape \(2, 3\) but holds 7 bytes"),
        (GOOD[:9], "announces 2 dimensions but ends within its header"),
    ],
)
def test_idx_content_that_contradicts_its_header(tmp_path, raw, message):
    (tmp_path / "a.gz").write_bytes(gzip.compress(raw))
    with pytest.raises(CorruptFileError, match=message):
        read_idx(tmp_path / "a.gz")


def deflate_damaged(content: bytes) -> bytes:
    return content[:10] + b"\xff" * 8 + content[18:]


@pytest.mark.parametrize(
    "damage", [lambda b: b[:-4], lambda b: b[:15], lambda b: b"", lambda b: b"plain text", deflate_damaged]
)
def test_broken_gzip(tmp_path, damage):
    content = gzip.compress(GOOD + bytes(range(256)))
    (tmp_path / "a.gz").write_bytes(damage(content))
    with pytest.raises(CorruptFileError, match=r"a\.gz (is truncated or not a gzip file|is not an IDX file)"):
        read_idx(tmp_path / "a.gz")
