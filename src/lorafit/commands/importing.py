"""Importing what a command needs, fast.

Python looks for garbage among all objects whenever their number has grown by a quarter. torch and transformers bring
360,000 that stay to the end, and looking through them again and again is an eighth of the time that importing them
takes, and some of the time after it. So it is not done while they are imported, and they are left out of it from then
on. What is garbage soon, which is nearly all of it, is found among the newest objects as ever.

Leaving out is for whoever owns the process, so commands do it and not what they call.
"""

from __future__ import annotations

import gc
import sys
from importlib import import_module

_NEVER = 2**31 - 1


def import_for_good(name: str) -> None:
    """Import a module that stays, with all that it needs; whatever is there then is never looked through for garbage.

    Where torch is there already there is little to gain, and the process may not be the command's own.
    """
    if "torch" in sys.modules:
        return
    young, older, oldest = gc.get_threshold()
    gc.set_threshold(young, older, _NEVER)
    try:
        import_module(name)
    finally:
        gc.set_threshold(young, older, oldest)
    gc.freeze()
