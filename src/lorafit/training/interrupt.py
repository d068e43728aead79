"""Ctrl-C between steps instead of inside one."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType


class Interrupt:
    """Whether the user asked to stop."""

    requested = False


@contextmanager
def deferred_interrupt(announce: Callable[[], None]) -> Iterator[Interrupt]:
    """Inside, the first Ctrl-C only sets ``requested`` and calls ``announce``; a second one interrupts at once.

    Signals reach the main thread only; in another thread this does nothing.
    """
    interrupt = Interrupt()
    if threading.current_thread() is not threading.main_thread():
        yield interrupt
        return

    def handle(number: int, frame: FrameType | None) -> None:
        if interrupt.requested:
            raise KeyboardInterrupt
        interrupt.requested = True
        # The signal may have come in the middle of a write to the same stream, which cannot be entered twice.
        with suppress(RuntimeError):
            announce()

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield interrupt
    finally:
        signal.signal(signal.SIGINT, before)
