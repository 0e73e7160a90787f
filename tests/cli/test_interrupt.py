"""Interrupts while child processes are started."""

from __future__ import annotations

import signal

import pytest

from emb_model_provider.cli.interrupt import delayed_interrupts


def test_an_interrupt_is_delayed_to_the_end_of_the_context() -> None:
    steps = []

    def start_process() -> None:
        with delayed_interrupts():
            signal.raise_signal(signal.SIGINT)
            steps.append("after the interrupt")

    with pytest.raises(KeyboardInterrupt):
        start_process()
    assert steps == ["after the interrupt"]


def test_the_handler_and_the_mask_are_restored() -> None:
    before = signal.getsignal(signal.SIGINT), signal.pthread_sigmask(signal.SIG_BLOCK, set())
    with delayed_interrupts():
        pass
    assert (signal.getsignal(signal.SIGINT), signal.pthread_sigmask(signal.SIG_BLOCK, set())) == before
