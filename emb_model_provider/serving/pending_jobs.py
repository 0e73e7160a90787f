"""The accepted requests of a model that are not answered yet, kept across crashes of the model.

A crash loses no request: the unanswered ones run again after the restart. A request that was running when the model
crashed may be the cause, so its next batches are exclusive to it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from emb_model_provider.serving.jobs import EmbeddingJob

_MAX_ATTEMPTS = 2
"""A request that was running at this many crashes fails, because it may be their cause."""


class PendingJobs:
    """Accepted requests by what happens to them next. Not thread-safe; guarded by the scheduler's lock."""

    def __init__(self) -> None:
        self.waiting: set[EmbeddingJob] = set()
        """Requests in the queue or running."""
        self._detached: set[EmbeddingJob] = set()
        """Requests that survived a crash and are not queued again yet."""
        self._suspects: set[EmbeddingJob] = set()
        """Detached requests that were running when the model crashed: one of them may be the cause."""
        self._isolated: set[EmbeddingJob] = set()
        """Suspects of the last crash that are queued again, exclusively."""

    @property
    def isolating(self) -> bool:
        """Whether suspects are running. Only one stream works then, so that a crash has one suspect."""
        return bool(self._isolated)

    def add(self, job: EmbeddingJob) -> None:
        """Add a request that the queue accepts."""
        self.waiting.add(job)

    def remove(self, job: EmbeddingJob) -> bool:
        """Remove a request that is answered or cancelled; return whether it was the last isolated one."""
        self.waiting.discard(job)
        self._detached.discard(job)
        if job not in self._isolated:
            return False
        self._isolated.discard(job)
        return not self._isolated

    def is_detached(self, job: EmbeddingJob) -> bool:
        """Return whether a request waits for the restart of the model, outside the queue."""
        return job in self._detached

    def mark_suspect(self, jobs: Iterable[EmbeddingJob]) -> None:
        """Record the requests that a stream was running when it crashed."""
        self._suspects.update(jobs)

    def on_crash(self) -> None:
        """Keep the requests of the queue until the model is restarted."""
        self._detached, self.waiting = self.waiting, set()

    def resume(self) -> tuple[list[EmbeddingJob], list[EmbeddingJob]]:
        """Take the detached requests after a restart.

        Returns:
            The requests to queue again, oldest first, and the requests that fail.
        """
        queued: list[EmbeddingJob] = []
        failed: list[EmbeddingJob] = []
        self._isolated = set()
        for job in sorted(self._detached, key=lambda job: job.arrived_at):
            if job in self._suspects:
                job.attempts += 1
                job.exclusive = True
            if job.attempts >= _MAX_ATTEMPTS:
                failed.append(job)
                continue
            if job.exclusive:
                self._isolated.add(job)
            job.reset()
            queued.append(job)
        self._detached, self._suspects = set(), set()
        self.waiting.update(queued)
        return queued, failed

    def drain(self) -> set[EmbeddingJob]:
        """Remove and return all requests."""
        pending = self._detached | self.waiting
        self._detached, self.waiting = set(), set()
        return pending
