"""Files that appear whole or not at all, and the hash that tells one from another."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lorafit.errors import MissingFileError


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Gives a temporary path beside ``path``, and moves it there in one step when the block ends well.

    Whatever goes wrong inside (an error, an interrupt, a full disk), the temporary file is removed, and what stood at
    ``path`` before is untouched.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def replacing_directory(path: str | Path) -> Iterator[Path]:
    """Gives a temporary directory beside ``path``, and moves it there when the block ends well.

    A directory that stood at ``path`` goes when the new one is complete. Whatever goes wrong inside, the temporary one
    is removed, and what stood there before is untouched.
    """
    path = Path(path)
    temporary, old = (path.with_name(f".{path.name}.{os.getpid()}.{end}") for end in ("tmp", "old"))
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for file in temporary.iterdir():
            with file.open("rb+") as opened:
                os.fsync(opened.fileno())
        if path.exists():
            os.replace(path, old)
        try:
            os.replace(temporary, path)
        except BaseException:
            if old.exists():
                os.replace(old, path)
            raise
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


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
