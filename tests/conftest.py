"""What all tests share: the embedded model, and settings that make them quick and cut off from hubs."""

import os
from pathlib import Path

import pytest

# Before torch is imported: tiny tensors get slower with many threads, and CI has two cores.
os.environ.setdefault("OMP_NUM_THREADS", str(min(os.cpu_count() or 1, 4)))
# Importing lorafit does this too, but a test may import torch first.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """SmolLM2-135M-Instruct Q4_1 in the user's cache; the first run ever fetches it."""
    from lorafit.models.pull import pull

    return pull("smollm2-135m")
