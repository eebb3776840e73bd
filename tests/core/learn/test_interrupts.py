"""Signals: noted while they are held, raised everywhere else, and taken from no host."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from agentpref.learn.interrupts import Interrupts

BOTH = (signal.SIGINT, signal.SIGTERM)


def handlers():
    return [signal.getsignal(signum) for signum in BOTH]


@pytest.mark.parametrize("signum", BOTH)
def test_the_first_is_held_until_the_block_ends(signum):
    interrupts, reached = Interrupts(), []

    def work():
        with interrupts.held():
            os.kill(os.getpid(), signum)
            reached.append(interrupts.asked)

    with interrupts.listening(), pytest.raises(KeyboardInterrupt):
        work()
    assert (reached, interrupts.signum) == ([True], signum)


@pytest.mark.parametrize("signum", BOTH)
def test_the_second_is_raised_at_once(signum):
    interrupts, reached = Interrupts(), []

    def work():
        with interrupts.held():
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signum)
            reached.append("the end")

    with interrupts.listening(), pytest.raises(KeyboardInterrupt):
        work()
    assert (reached, interrupts.signum) == ([], signum)


@pytest.mark.parametrize("signum", BOTH)
def test_outside_of_the_block_it_is_raised_at_once(signum):
    interrupts = Interrupts()
    with interrupts.listening(), pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signum)
    assert interrupts.signum == signum


def test_handlers_are_as_they_were_afterwards():
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


def test_in_another_thread_nothing_is_taken():
    found = []

    def listen():
        with Interrupts().listening():
            found.append(handlers())

    before = handlers()
    thread = threading.Thread(target=listen)
    thread.start()
    thread.join()
    assert found == [before]


def test_nobody_asked():
    interrupts = Interrupts()
    with interrupts.held():
        pass
    assert not interrupts.asked
