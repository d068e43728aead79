"""Files that appear whole or not at all; fingerprints against hashlib over everything at once."""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lorafit.containers import atomic
from lorafit.containers.atomic import fingerprint, replacing, replacing_directory, write_text
from lorafit.errors import MissingFileError


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def test_a_file_appears_when_the_block_ends(tmp_path: Path) -> None:
    target = tmp_path / "new" / "folder" / "out.bin"
    with replacing(target) as temporary:
        assert temporary.parent == target.parent, "another file system could not be renamed into"
        temporary.write_bytes(b"new")
        assert not target.exists()
    assert target.read_bytes() == b"new"
    assert names(target.parent) == ["out.bin"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("before", [None, b"old"])
def test_after_an_error_all_is_as_it_was(tmp_path: Path, error: type[BaseException], before: bytes | None) -> None:
    target = tmp_path / "out.bin"
    if before is not None:
        target.write_bytes(before)

    def half_written() -> None:
        with replacing(target) as temporary:
            temporary.write_bytes(b"half")
            raise error

    with pytest.raises(error):
        half_written()
    assert names(tmp_path) == ([] if before is None else ["out.bin"])
    assert before is None or target.read_bytes() == before


def test_when_the_disk_takes_no_more_all_is_as_it_was(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    target = tmp_path / "out.txt"
    write_text(target, "old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            write_text(target, "x" * 20_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert target.read_text() == "old"
    assert names(tmp_path) == ["out.txt"]


def left_by(process: int, target: Path) -> Path:
    """What another process of this machine would have left beside ``target``."""
    with replacing(target) as temporary:
        temporary.write_bytes(b"")
    target.unlink()
    return temporary.with_name(temporary.name.replace(str(os.getpid()), str(process)))


def test_what_a_killed_process_left_is_removed_by_the_next(tmp_path: Path) -> None:
    target = tmp_path / "out"
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    for process, kept in ((ended.pid, False), (os.getppid(), True)):
        left = left_by(process, target)
        for again in (True, False):
            if again:
                left.mkdir()
                (left / "half").write_bytes(b"half")
                with replacing_directory(target) as temporary:
                    (temporary / "whole").write_bytes(b"whole")
            else:
                left.write_bytes(b"half")
                with replacing(target) as temporary:
                    temporary.write_bytes(b"whole")
            assert left.exists() == kept
            for path in (left, target):
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink(missing_ok=True)
    mine = left_by(os.getpid(), target)
    mine.mkdir()
    with replacing_directory(target) as temporary:
        assert temporary == mine
        (temporary / "whole").write_bytes(b"whole")
    assert names(target) == ["whole"]


@pytest.mark.parametrize("swaps", [True, False])
def test_a_directory_takes_the_place_of_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, swaps: bool) -> None:
    """Where the system can do that in one step, and where it cannot."""
    if not swaps:
        monkeypatch.setattr(atomic, "_SWAP", 1 << 20)  # a flag that no system knows
    target = tmp_path / "out"
    for content in ("old", "new"):
        with replacing_directory(target) as temporary:
            (temporary / content).write_text(content)
            assert not target.exists() or names(target) == ["old"]
    assert names(target) == ["new"]
    assert names(tmp_path) == ["out"]


@pytest.mark.skipif(sys.platform != "linux", reason="two names change places in one step there")
def test_there_is_no_moment_without_a_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seen from the calls: the new one is never moved to a name that is free for a moment."""
    target = tmp_path / "out"
    target.mkdir()
    monkeypatch.setattr(os, "replace", lambda *_: pytest.fail("one name is free until the other is moved"))
    with replacing_directory(target) as temporary:
        (temporary / "whole").write_bytes(b"")
    assert names(target) == ["whole"]


def test_text_is_written_as_utf_8(tmp_path: Path) -> None:
    write_text(tmp_path / "a.txt", "Größe ⛴\n")
    assert (tmp_path / "a.txt").read_bytes() == "Größe ⛴\n".encode()


def test_fingerprint_of_a_file(tmp_path: Path) -> None:
    content = bytes(range(256)) * 5000
    (tmp_path / "model.gguf").write_bytes(content)
    assert fingerprint(tmp_path / "model.gguf") == hashlib.sha256(content).hexdigest()


def test_fingerprint_of_a_directory_is_that_of_its_weights(tmp_path: Path) -> None:
    def model(folder: str, shards: dict[str, bytes]) -> Path:
        (tmp_path / folder).mkdir()
        for name, content in shards.items():
            (tmp_path / folder / name).write_bytes(content)
        return tmp_path / folder

    first = model("first", {"a.safetensors": b"1", "b.safetensors": b"2", "config.json": b"{}"})
    same = model("same", {"b.safetensors": b"2", "a.safetensors": b"1", "README.md": b"other"})
    assert fingerprint(first) == fingerprint(same)
    listing = "".join(
        f"{hashlib.sha256(content).hexdigest()}  {name}.safetensors\n" for name, content in (("a", b"1"), ("b", b"2"))
    )
    assert fingerprint(first) == hashlib.sha256(listing.encode()).hexdigest()
    others = [
        model("swapped", {"a.safetensors": b"2", "b.safetensors": b"1"}),
        model("renamed", {"a.safetensors": b"1", "c.safetensors": b"2"}),
        model("fewer", {"a.safetensors": b"1"}),
    ]
    assert len({fingerprint(folder) for folder in (first, *others)}) == 4


def test_what_is_not_there_has_no_fingerprint(tmp_path: Path) -> None:
    for path in (tmp_path / "none.gguf", tmp_path):
        with pytest.raises(MissingFileError, match=str(path)):
            fingerprint(path)
