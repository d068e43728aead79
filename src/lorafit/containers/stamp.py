"""Size and modification time of files: a cheap way to see that a base is no longer what was loaded.

A mapped file is read for as long as its model is used, so whoever writes to it changes the weights in the middle of a
run. A hash would see every change, but reads gigabytes; what an editor, a download or a copy leaves behind is seen in
what the file system knows already.
"""

from __future__ import annotations

from pathlib import Path

# What a model is read from, in a directory.
_READ = ("*.safetensors", "*.json")

Stamp = dict[str, tuple[int, int]]


def take_stamp(path: Path) -> Stamp:
    """Name -> (bytes, modification time in nanoseconds) of a file, or of the weights and settings in a directory."""
    files = [file for pattern in _READ for file in path.glob(pattern)] if path.is_dir() else [path]
    found = {}
    for file in files:
        try:
            status = file.stat()
        except FileNotFoundError:
            continue
        found[str(file)] = (status.st_size, status.st_mtime_ns)
    return found


def changed_file(path: Path, before: Stamp) -> str | None:
    """The first file that was changed, removed or added since a stamp was taken; None if there is none."""
    now = take_stamp(path)
    return next((file for file in sorted(before | now) if before.get(file) != now.get(file)), None)
