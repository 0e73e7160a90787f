"""Interrupts while child processes are started."""

from __future__ import annotations

import signal
import subprocess
import sys

from emb_model_provider.cli.interrupt import delayed_interrupts

PROGRAM = """
import signal
from emb_model_provider.cli.interrupt import delayed_interrupts

try:
    with delayed_interrupts():
        signal.raise_signal(signal.SIGINT)
        print("after the interrupt")
except KeyboardInterrupt:
    print("interrupted")
"""


def test_an_interrupt_is_delayed_to_the_end_of_the_context() -> None:
    """In a process of its own, because a process of the tests has threads of many native libraries."""
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["after the interrupt", "interrupted"]


def test_the_handler_and_the_mask_are_restored() -> None:
    before = signal.getsignal(signal.SIGINT), signal.pthread_sigmask(signal.SIG_BLOCK, set())
    with delayed_interrupts():
        pass
    assert (signal.getsignal(signal.SIGINT), signal.pthread_sigmask(signal.SIG_BLOCK, set())) == before
