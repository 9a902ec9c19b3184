"""Checksums: what is listed is checked by name, and a list that is missing, empty or malformed is no list."""

import hashlib
from pathlib import Path

import pytest

from diffusion_opt.datasets import CorruptFileError, verify, write_sums
from diffusion_opt.datasets.integrity import SUMS, read_sums, sha256


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "part").mkdir()
    (tmp_path / "part" / "weights.bin").write_bytes(bytes(range(256)) * 40)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "README.md").write_text("a card")
    write_sums(tmp_path)
    return tmp_path


def test_sha256_is_that_of_hashlib(folder):
    assert sha256(folder / "config.json") == hashlib.sha256(b"{}").hexdigest()


def test_written_sums_list_all_but_card_and_list(folder):
    assert list(read_sums(folder)) == ["config.json", "part/weights.bin"]
    verify(folder)
    write_sums(folder)
    assert list(read_sums(folder)) == ["config.json", "part/weights.bin"]


def test_card_may_change(folder):
    (folder / "README.md").write_text("a better card")
    verify(folder)


def test_one_flipped_bit_is_named(folder):
    path = folder / "part" / "weights.bin"
    content = bytearray(path.read_bytes())
    content[5000] ^= 1
    path.write_bytes(content)
    with pytest.raises(CorruptFileError, match=r"part/weights\.bin is damaged: its SHA-256 is .*10,240 bytes on disk"):
        verify(folder)


def test_truncated_file_is_named(folder):
    path = folder / "part" / "weights.bin"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CorruptFileError, match=r"weights\.bin is damaged: .*10,239 bytes on disk.*restore it with git"):
        verify(folder)


def test_missing_file_is_named(folder):
    (folder / "config.json").unlink()
    with pytest.raises(CorruptFileError, match=r"config\.json is missing; restore it with git"):
        verify(folder)


def test_missing_list(tmp_path):
    with pytest.raises(CorruptFileError, match=f"{SUMS} is missing; restore it with git"):
        verify(tmp_path)


def test_empty_list_vouches_for_nothing(folder):
    (folder / SUMS).write_text("")
    with pytest.raises(CorruptFileError, match="lists no file"):
        verify(folder)


@pytest.mark.parametrize(
    "line",
    [
        "0" * 64 + "  ../outside.bin",
        "0" * 64 + "  part/../../outside.bin",
        "0" * 64 + "  /etc/hostname",
        "0" * 63 + "  config.json",
        "0" * 64 + " config.json",
        "0" * 64,
    ],
)
def test_malformed_lines_and_paths_that_leave_the_folder(folder, line):
    (folder / SUMS).write_text(line + "\n")
    with pytest.raises(CorruptFileError, match="malformed line"):
        verify(folder)
