"""Files that are there in full or not at all: written beside their place, flushed to the disk, then moved into it.

A process may be killed at any byte, and a disk may fill up at any byte. `path.write_text(…)` then leaves half a file
under the right name, which the next run reads as if it were good. Here every file is written under a name of its own in
the same folder, flushed (`fsync`), and renamed; POSIX makes the rename atomic. Afterwards the folder is flushed too,
because a rename that is not on the disk is lost when the machine stops. What stood there before stays until then.

    write_json(path, value)          a JSON file; NaN and infinity are refused, since JSON has no word for them
    write_tensors(path, tensors)     a safetensors file
    with written(path) as fresh:     any other: write to `fresh`

A process that was killed leaves its unfinished file behind, `.<name>.<host>.<process>.<number>.new`; the next write to
the same path removes those of processes that are gone.
"""

import json
import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from glob import escape
from itertools import count
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

_NUMBERS = count()  # tells apart the files that threads of one process write


class CorruptFileError(OSError):
    """A file is missing, truncated or altered; the message names it and says what to do."""


@contextmanager
def written(path: Path) -> Iterator[Path]:
    """A place to write what `path` is to hold; it is moved there when the block ends, and removed if the block fails.

    Raises OSError, naming `path`, if the disk is full or cannot be written to; `path` is then as it was.
    """
    path = Path(path)
    _remove_leftovers(path)
    fresh = path.parent / f".{path.name}.{socket.gethostname()}.{os.getpid()}.{next(_NUMBERS)}.new"
    try:
        yield fresh
        flush(fresh)
        os.replace(fresh, path)
    except SafetensorError as error:
        raise OSError(f"could not write {path}: {error}") from error
    except OSError as error:
        raise OSError(error.errno, f"could not write {path}: {error.strerror}") from error
    finally:
        fresh.unlink(missing_ok=True)
    flush(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    with written(path) as fresh:
        fresh.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any, indent: int | None = 2) -> None:
    """Write a JSON file, whole or not at all. Raises ValueError for NaN and infinity, which JSON cannot say."""
    write_text(path, json.dumps(value, indent=indent, allow_nan=False) + "\n")


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file, whole or not at all."""
    with written(path) as fresh:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, fresh, metadata)


def read_json(path: Path, remedy: str) -> Any:
    """The content of a JSON file; `remedy` says what to do if it is none.

    Raises CorruptFileError, naming the file, if it is missing, empty, cut off or not JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CorruptFileError(f"{path} is missing; {remedy}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        size = Path(path).stat().st_size
        raise CorruptFileError(f"{path} is damaged ({size:,} bytes, not JSON: {error}); {remedy}") from None


def flush(path: Path) -> None:
    """Wait until a file, or the list of a folder's files, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove_leftovers(path: Path) -> None:
    """Remove unfinished files of `path` whose process, on this machine, is gone."""
    for old in path.parent.glob(f".{escape(path.name)}.{socket.gethostname()}.*.new"):
        process = old.name.removesuffix(".new").split(".")[-2]
        if process.isdigit() and not is_alive(int(process)):
            old.unlink(missing_ok=True)


def is_alive(process: int) -> bool:
    """Whether a process of this machine exists."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it exists and belongs to somebody else
        return True
    return True
