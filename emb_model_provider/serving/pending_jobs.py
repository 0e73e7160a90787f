"""The jobs that a model let in and has not answered, kept through its breakdowns.

A model that breaks down loses no job: those it had are stranded, and run again once it is back. One that was in a batch
when it broke down may be the reason, and has its next batches to itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from emb_model_provider.serving.jobs import EmbeddingJob

_MOST_ATTEMPTS = 2
"""A job that was in a batch whose lane ended is tried once more; it may be what ends them."""


class PendingJobs:
    """Jobs by what becomes of them next. Not for several threads: the lanes' lock guards it."""

    def __init__(self) -> None:
        self.waiting: set[EmbeddingJob] = set()
        """Those that the present queue has, or that lanes have in hand."""
        self._detached: set[EmbeddingJob] = set()
        """Those of a queue whose lanes ended."""
        self._suspects: set[EmbeddingJob] = set()
        """Stranded ones that a lane had in hand when the lanes ended: one of them may be the reason."""
        self._isolated: set[EmbeddingJob] = set()
        """Suspects of last time, each in batches of its own."""

    @property
    def isolating(self) -> bool:
        """Whether suspects of the last breakdown run: one lane at a time then, so that it is known whose fault it is."""
        return bool(self._isolated)

    def add(self, job: EmbeddingJob) -> None:
        """Keep a job that the queue takes."""
        self.waiting.add(job)

    def forget(self, job: EmbeddingJob) -> bool:
        """Let go of a job that is answered, or that nobody awaits; return whether that ends the quarantine."""
        self.waiting.discard(job)
        self._detached.discard(job)
        if job not in self._isolated:
            return False
        self._isolated.discard(job)
        return not self._isolated

    def is_detached(self, job: EmbeddingJob) -> bool:
        """Whether no queue has the job."""
        return job in self._detached

    def mark_suspect(self, jobs: Iterable[EmbeddingJob]) -> None:
        """Note whose inputs a lane had in hand when it ended."""
        self._suspects.update(jobs)

    def on_crash(self) -> None:
        """The queue is gone: keep its jobs for the next one."""
        self._detached, self.waiting = self.waiting, set()

    def resume(self) -> tuple[list[EmbeddingJob], list[EmbeddingJob]]:
        """Return the stranded jobs that the next queue shall have, oldest first, and those that had their chances."""
        again: list[EmbeddingJob] = []
        refused: list[EmbeddingJob] = []
        self._isolated = set()
        for job in sorted(self._detached, key=lambda job: job.arrived_at):
            if job in self._suspects:
                job.attempts += 1
                job.exclusive = True
            if job.attempts >= _MOST_ATTEMPTS:
                refused.append(job)
                continue
            if job.exclusive:
                self._isolated.add(job)
            job.reset()
            again.append(job)
        self._detached, self._suspects = set(), set()
        self.waiting.update(again)
        return again, refused

    def drain(self) -> set[EmbeddingJob]:
        """Keep none, and return all there were."""
        left = self._detached | self.waiting
        self._detached, self.waiting = set(), set()
        return left
