"""The first signal waits for the end of a held block; all others are raised at once."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from agentpref.learn.process import Interrupts

BOTH = (signal.SIGINT, signal.SIGTERM)


def handlers():
    return [signal.getsignal(signum) for signum in BOTH]


@pytest.mark.parametrize("signum", BOTH)
def test_the_first_signal_is_raised_at_the_end_of_a_held_block(signum):
    interrupts, reached = Interrupts(), []

    def work():
        with interrupts.deferred():
            os.kill(os.getpid(), signum)
            reached.append(interrupts.asked)

    with interrupts.listening(), pytest.raises(KeyboardInterrupt):
        work()
    assert (reached, interrupts.signum) == ([True], signum)


@pytest.mark.parametrize("signum", BOTH)
def test_the_second_signal_is_raised_at_once(signum):
    interrupts, reached = Interrupts(), []

    def work():
        with interrupts.deferred():
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signum)
            reached.append("the end")

    with interrupts.listening(), pytest.raises(KeyboardInterrupt):
        work()
    assert (reached, interrupts.signum) == ([], signum)


@pytest.mark.parametrize("signum", BOTH)
def test_a_signal_outside_of_a_held_block_is_raised_at_once(signum):
    interrupts = Interrupts()
    with interrupts.listening(), pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signum)
    assert interrupts.signum == signum


def test_the_default_handlers_are_back_after_listening():
    before = handlers()
    with Interrupts().listening():
        assert handlers() != before
    assert handlers() == before


def test_a_hosts_own_handler_stays(monkeypatch):
    caught = []
    before = signal.signal(signal.SIGTERM, lambda signum, frame: caught.append(signum))
    try:
        with Interrupts().listening():
            os.kill(os.getpid(), signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert caught == [signal.SIGTERM]


def test_listening_in_another_thread_changes_no_handler():
    found = []

    def listen():
        with Interrupts().listening():
            found.append(handlers())

    before = handlers()
    thread = threading.Thread(target=listen)
    thread.start()
    thread.join()
    assert found == [before]


def test_a_held_block_without_a_signal_ends_normally():
    interrupts = Interrupts()
    with interrupts.deferred():
        pass
    assert not interrupts.asked


def test_who_asks_from_another_thread_ends_the_work_at_the_next_report():
    interrupts, told = Interrupts(), []
    report = interrupts.reporting(lambda *progress: told.append(progress))
    report("score", 1, 2)
    thread = threading.Thread(target=interrupts.ask, args=[signal.SIGTERM])
    thread.start()
    thread.join()
    with pytest.raises(KeyboardInterrupt):
        report("score", 2, 2)
    assert told == [("score", 1, 2), ("score", 2, 2)]
    assert interrupts.signum == signal.SIGTERM


def test_a_held_block_in_which_somebody_asks_is_left_at_its_end():
    interrupts, reached = Interrupts(), []

    def work():
        with interrupts.deferred():
            interrupts.ask(signal.SIGINT)
            interrupts.reporting(None)("train", 1, 2)
            reached.append(interrupts.asked)

    with pytest.raises(KeyboardInterrupt):
        work()
    assert reached == [True]
