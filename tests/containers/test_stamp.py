"""Stamps: whatever happens to a file of a model is seen, and nothing else is."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from lorafit.containers.stamp import changed_file, take_stamp


def set_time(path: Path) -> None:
    """One nanosecond later than it was: what is stored must not be rounded."""
    at = path.stat().st_mtime_ns
    os.utime(path, ns=(at, at + 1))


def grow(path: Path) -> None:
    """Longer by a byte, and as old as before."""
    at = path.stat().st_mtime_ns
    path.write_bytes(path.read_bytes() + b"x")
    os.utime(path, ns=(at, at))


CHANGES = [set_time, grow, Path.unlink]


@pytest.mark.parametrize("change", CHANGES)
def test_a_file_that_changed(tmp_path: Path, change: Callable[[Path], object]) -> None:
    path = tmp_path / "base.gguf"
    path.write_bytes(b"weights")
    stamp = take_stamp(path)
    (tmp_path / "beside").write_bytes(b"nobody asked for this one")
    assert changed_file(path, stamp) is None
    change(path)
    assert changed_file(path, stamp) == str(path)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", ["model-2.safetensors", "config.json"])
def test_a_directory_of_which_a_file_changed(tmp_path: Path, name: str, change: Callable[[Path], object]) -> None:
    for file in ("model-1.safetensors", "model-2.safetensors", "config.json", "notes.txt"):
        (tmp_path / file).write_bytes(b"content")
    stamp = take_stamp(tmp_path)
    (tmp_path / "notes.txt").write_bytes(b"are not read")
    assert changed_file(tmp_path, stamp) is None
    change(tmp_path / name)
    assert changed_file(tmp_path, stamp) == str(tmp_path / name)


def test_a_shard_that_was_added(tmp_path: Path) -> None:
    stamp = take_stamp(tmp_path)
    (tmp_path / "new.safetensors").write_bytes(b"weights")
    assert changed_file(tmp_path, stamp) == str(tmp_path / "new.safetensors")
