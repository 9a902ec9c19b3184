"""Files that are what they claim to be: SHA-256 checked before a byte is used.

A truncated download or an altered weight file must fail at once and by name, not three layers further on. Each folder
of `data/` holds a `SHA256SUMS` file in the format of `sha256sum`, so `sha256sum -c SHA256SUMS` checks it as well.
"""

import hashlib
from pathlib import Path

from diffusion_opt.datasets.writing import CorruptFileError, write_text

SUMS = "SHA256SUMS"


def sha256(path: Path) -> str:
    """Hex digest of a file, read in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_sums(folder: Path) -> None:
    """Write `SHA256SUMS` for all files below `folder` (but not for itself and not for `README.md` cards)."""
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    lines = [f"{sha256(folder / name)}  {name}" for name in names if name not in (SUMS, "README.md")]
    write_text(folder / SUMS, "\n".join(lines) + "\n")


def read_sums(folder: Path) -> dict[str, str]:
    """File name -> expected digest. Raises CorruptFileError if the list is missing, empty or malformed."""
    path = folder / SUMS
    if not path.is_file():
        raise CorruptFileError(f"{path} is missing; restore it with git, for example `git checkout -- data`")
    sums = {}
    for line in path.read_text().splitlines():
        digest, _, name = line.partition("  ")
        if len(digest) != 64 or not name or Path(name).is_absolute() or ".." in Path(name).parts:
            raise CorruptFileError(f"{path} holds a malformed line: {line!r}")
        sums[name] = digest
    if not sums:
        raise CorruptFileError(f"{path} lists no file; restore it with git, for example `git checkout -- data`")
    return sums


def verify(folder: Path) -> None:
    """Check each file that `SHA256SUMS` lists.

    Raises CorruptFileError naming the first file that is missing or differs.
    """
    for name, expected in read_sums(folder).items():
        path = folder / name
        if not path.is_file():
            raise CorruptFileError(f"{path} is missing; restore it with git, for example `git checkout -- data`")
        if (found := sha256(path)) != expected:
            raise CorruptFileError(
                f"{path} is damaged: its SHA-256 is {found[:12]}…, expected {expected[:12]}… "
                f"({path.stat().st_size:,} bytes on disk); restore it with git, for example `git checkout -- data`"
            )
