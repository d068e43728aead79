"""How much memory this process has used at most."""

from __future__ import annotations

import sys


def peak_rss_bytes() -> int | None:
    """Peak resident memory of this process, mapped files included; None where the system does not tell (Windows)."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Linux counts kibibytes, macOS bytes.
    return int(peak if sys.platform == "darwin" else peak * 1024)
