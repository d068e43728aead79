"""Files that appear whole or not at all, and the hash that tells one from another."""

from __future__ import annotations

import ctypes
import glob
import hashlib
import os
import platform
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lorafit.errors import MissingFileError

# Of renameat2: paths that are relative are so to the working directory, and names change places.
_HERE, _SWAP = -100, 2

# Processes are known by their number on one machine only, of which several may write to one disk.
_MACHINE = re.sub(r"\W", "", platform.node())


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Gives a temporary path beside ``path``, and moves it there in one step when the block ends well.

    Whatever goes wrong inside (an error, an interrupt, a full disk), the temporary file is removed, and what stood at
    ``path`` before is untouched. A process that is killed leaves the temporary one, which the next to write there
    removes.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path)
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def replacing_directory(path: str | Path) -> Iterator[Path]:
    """The same for a directory.

    One that stood at ``path`` changes places with the new one in one step where the system can do that. Elsewhere it is
    moved aside first, so that a kill just then leaves it beside ``path``, with ``.old`` at the end of its name.
    """
    path = Path(path)
    temporary = _temporary(path)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for file in temporary.iterdir():
            with file.open("rb+") as opened:
                os.fsync(opened.fileno())
        if not path.exists():
            os.replace(temporary, path)
        elif not _exchange(temporary, path):
            _replace_by_moves(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _replace_by_moves(new: Path, path: Path) -> None:
    old = new.with_suffix(".old")
    os.replace(path, old)
    try:
        os.replace(new, path)
    except BaseException:
        os.replace(old, path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Let two names change places in one step; false where the system or the file system cannot."""
    try:
        rename = ctypes.CDLL(None).renameat2  # Linux
    except (AttributeError, OSError, TypeError):
        return False
    return rename(_HERE, os.fsencode(one.absolute()), _HERE, os.fsencode(other.absolute()), _SWAP) == 0


def _temporary(path: Path) -> Path:
    """A name beside ``path`` that says whose it is; what this machine's killed processes left there is removed."""
    prefix = f".{path.name}.{_MACHINE}-"
    for left in path.parent.glob(f"{glob.escape(prefix)}*.tmp"):
        process = left.name.removeprefix(prefix).removesuffix(".tmp")
        # One of this number is an earlier process, as the first in a container that is started again.
        if process.isdigit() and (int(process) == os.getpid() or not _lives(int(process))):
            if left.is_dir():
                shutil.rmtree(left, ignore_errors=True)
            else:
                left.unlink(missing_ok=True)
    return path.with_name(f"{prefix}{os.getpid()}.tmp")


def _lives(process: int) -> bool:
    if os.name != "posix":  # elsewhere asking so would end it
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def write_text(path: str | Path, text: str) -> None:
    """Write a text file so that it appears whole."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def fingerprint(path: str | Path) -> str:
    """SHA-256 of a model: of the file, or for a directory of the names and hashes of its .safetensors files.

    Raises:
        MissingFileError: There is neither.
    """
    path = Path(path)
    if path.is_file():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    lines = [f"{fingerprint(shard)}  {shard.name}\n" for shard in sorted(path.glob("*.safetensors"))]
    if not lines:
        raise MissingFileError(f"{path}: no such file, nor a directory of safetensors")
    return hashlib.sha256("".join(lines).encode()).hexdigest()
