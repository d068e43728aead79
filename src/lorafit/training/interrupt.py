"""Ctrl-C between steps instead of inside one."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupt:
    """Whether the user asked to stop."""

    requested = False


@contextmanager
def deferred_interrupt(announce: Callable[[], None]) -> Iterator[Interrupt]:
    """Inside, the first Ctrl-C only sets ``requested`` and calls ``announce``; a second one interrupts at once.

    The call is made in a thread of its own: the signal may come in the middle of a write to the stream that
    ``announce`` writes to, and another thread waits for the end of that write where a signal handler could not.
    Signals reach the main thread only; in another thread this does nothing.
    """
    interrupt = Interrupt()
    if threading.current_thread() is not threading.main_thread():
        yield interrupt
        return
    announcement = threading.Thread(target=announce)

    def handle(number: int, frame: FrameType | None) -> None:
        if interrupt.requested:
            raise KeyboardInterrupt
        interrupt.requested = True
        announcement.start()

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield interrupt
    finally:
        signal.signal(signal.SIGINT, before)
        if interrupt.requested:
            announcement.join()
