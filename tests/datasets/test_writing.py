"""A file is written in full or not at all, whatever happens on the way."""

import errno
import json
import math
import os
import resource
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from diffusion_opt.datasets import CorruptFileError, read_json, write_json, write_tensors, writing, written


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_json_and_tensors_come_back(tmp_path):
    value = {"a": [1, 2.5, None], "b": "ü"}
    write_json(tmp_path / "x.json", value)
    assert read_json(tmp_path / "x.json", "make it again") == value
    tensors = {"t": torch.arange(6.0).reshape(2, 3).T}  # not contiguous
    write_tensors(tmp_path / "x.safetensors", tensors)
    assert torch.equal(load_file(tmp_path / "x.safetensors")["t"], tensors["t"])
    assert names(tmp_path) == ["x.json", "x.safetensors"]


def test_json_has_no_word_for_nan(tmp_path):
    write_json(tmp_path / "x.json", 1)
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "x.json", {"loss": math.nan})
    assert read_json(tmp_path / "x.json", "") == 1


def test_an_error_while_writing_keeps_what_was_there(tmp_path):
    path = tmp_path / "x.json"
    write_json(path, 1)
    with pytest.raises(ZeroDivisionError), written(path) as fresh:
        fresh.write_text("half")
        1 / 0  # noqa: B018
    assert read_json(path, "") == 1 and names(tmp_path) == ["x.json"]


@pytest.mark.parametrize("room", [0, 1, 100, 4096, 20_000])
def test_a_full_disk_keeps_what_was_there_and_names_the_file(tmp_path, room):
    """Stands for a full disk: the kernel refuses to make any file of this process larger than `room` bytes."""
    path, soft = tmp_path / "x.safetensors", resource.getrlimit(resource.RLIMIT_FSIZE)
    write_tensors(path, {"t": torch.ones(3)})
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, soft[1]))
    try:
        with pytest.raises(OSError, match=r"could not write .*x\.safetensors"):
            write_tensors(path, {"t": torch.ones(10_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, soft)
    assert load_file(path)["t"].tolist() == [1.0, 1.0, 1.0] and names(tmp_path) == ["x.safetensors"]


def test_a_write_that_fails_on_flushing_is_no_write(tmp_path, monkeypatch):
    """A network disk may report that it is full only when it is told to flush."""
    path = tmp_path / "x.json"
    write_json(path, 1)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(writing.os, "fsync", full)
        with pytest.raises(OSError, match=r"could not write .*x\.json: No space left"):
            write_json(path, 2)
    assert read_json(path, "") == 1 and names(tmp_path) == ["x.json"]


def test_leftovers_of_killed_writers_are_removed_and_those_of_others_stay(tmp_path):
    killed = subprocess.Popen([sys.executable, "-c", ""])
    killed.wait()
    host = socket.gethostname()
    for process in (killed.pid, os.getppid()):
        (tmp_path / f".x.json.{host}.{process}.0.new").write_text("half")
    (tmp_path / f".x.json.elsewhere.{killed.pid}.0.new").write_text("half")
    write_json(tmp_path / "x.json", 1)
    assert names(tmp_path) == sorted(
        ["x.json", f".x.json.{host}.{os.getppid()}.0.new", f".x.json.elsewhere.{killed.pid}.0.new"]
    )


@pytest.mark.parametrize("cut", [0, 1, 5, -3])
def test_a_damaged_file_is_named_with_what_to_do(tmp_path, cut):
    whole = json.dumps({"a": 1, "b": 2}).encode()
    (tmp_path / "x.json").write_bytes(whole[:cut])
    with pytest.raises(CorruptFileError, match=r"x\.json is damaged \(\d+ bytes, not JSON.*; make it again"):
        read_json(tmp_path / "x.json", "make it again")
    with pytest.raises(CorruptFileError, match=r"y\.json is missing; make it again"):
        read_json(tmp_path / "y.json", "make it again")
