"""Giving pages of a mapped file back, by what the system says is resident."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from lorafit.containers.mapped import map_file, mapped_files, release

SIZE = 1 << 24


@pytest.fixture
def content(tmp_path: Path) -> Path:
    path = tmp_path / "content"
    np.random.default_rng(0).integers(0, 256, SIZE, np.uint8).tofile(path)
    return path


def mapped_tensor(path: Path) -> torch.Tensor:
    with path.open("rb") as file:
        return torch.frombuffer(map_file(file), dtype=torch.uint8)


def resident() -> int:
    """Bytes of files in this process's memory."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssFile"))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_released_pages_leave_memory_and_come_back(content: Path) -> None:
    tensor = mapped_tensor(content)
    before = resident()
    total = int(tensor.sum())
    read = resident()
    # Other mappings may come and go, but not by megabytes.
    assert read - before > SIZE * 0.9
    release(tensor[SIZE // 2 :])
    assert read - resident() > SIZE * 0.4
    assert resident() - before > SIZE * 0.4
    assert int(tensor.sum()) == total


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_pages_of_files_that_others_mapped_are_released_too(tmp_path: Path) -> None:
    save_file({name: torch.full((SIZE,), number) for number, name in enumerate("ab")}, tmp_path / "x.safetensors")
    tensors = load_file(tmp_path / "x.safetensors")
    files = mapped_files()
    read = [int(tensor.sum()) for tensor in tensors.values()]
    full = resident()
    release(tensors["b"])
    assert full - resident() < SIZE, "nobody said where files are"
    release(tensors["b"], files)
    assert 0.9 * tensors["b"].nbytes < full - resident() < 1.1 * tensors["b"].nbytes
    assert [int(tensor.sum()) for tensor in tensors.values()] == read == [0, SIZE]


def test_what_is_not_released_stays(content: Path) -> None:
    """Pages at the edges belong to neighbours too, and other memory to no file at all."""
    tensor = mapped_tensor(content)
    tensor[4095], tensor[3 * 4096] = 1, 2  # in memory only
    release(tensor[4095 : 3 * 4096 + 1])
    assert (tensor[4095], tensor[3 * 4096]) == (1, 2)
    own = torch.ones(SIZE, dtype=torch.uint8)
    release(own)
    release(own, mapped_files())
    assert bool((own == 1).all())
    assert bool((torch.from_numpy(np.fromfile(content, np.uint8))[4096 : 3 * 4096] == tensor[4096 : 3 * 4096]).all())


def test_a_mapping_that_is_gone_is_forgotten(content: Path) -> None:
    tensor = mapped_tensor(content)
    address = tensor.data_ptr()
    del tensor
    from lorafit.containers import mapped

    assert address not in mapped._mappings
