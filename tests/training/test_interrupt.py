"""Ctrl-C: the first asks, the second insists."""

import signal
import threading

import pytest

from lorafit.training.interrupt import deferred_interrupt


def ctrl_c() -> None:
    signal.raise_signal(signal.SIGINT)


def test_the_first_only_asks_and_is_answered() -> None:
    answered = threading.Event()
    with deferred_interrupt(answered.set) as interrupt:
        assert not interrupt.requested
        ctrl_c()
        assert interrupt.requested
        assert answered.wait(10), "while the step goes on"


def test_the_second_interrupts() -> None:
    with deferred_interrupt(lambda: None):
        ctrl_c()
        with pytest.raises(KeyboardInterrupt):
            ctrl_c()


def test_the_answer_waits_for_the_line_that_is_being_written() -> None:
    stream, said = threading.Lock(), []

    def announce() -> None:
        with stream:
            said.append("stopping")

    with deferred_interrupt(announce), stream:
        ctrl_c()
        said.append("training 1/9")
    assert said == ["training 1/9", "stopping"]


def test_afterwards_ctrl_c_does_what_it_did_before() -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(ZeroDivisionError), deferred_interrupt(lambda: None):
        raise ZeroDivisionError
    assert signal.getsignal(signal.SIGINT) is before


def test_other_threads_get_no_signals_and_no_error() -> None:
    seen = []

    def work() -> None:
        with deferred_interrupt(lambda: None) as interrupt:
            seen.append(interrupt.requested)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [False]
