"""Transfers repositories from one hub to another: the Python API, which the command line and REST use too."""

from __future__ import annotations

import json
import logging
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from emb_model_provider.error_table import error_info
from emb_model_provider.errors import OfflineError, OperationCancelledError, ProviderError, TransferError
from emb_model_provider.formatting import describe_error
from emb_model_provider.progress import CancelToken, ignore_progress
from emb_model_provider.settings.loading import load_settings
from emb_model_provider.snapshots.files import write_atomically
from emb_model_provider.transfer.batch import Pair, read_pairs
from emb_model_provider.transfer.copy import Copier
from emb_model_provider.transfer.journal import TransferJournal
from emb_model_provider.transfer.location import parse_destination, parse_source
from emb_model_provider.transfer.plan import make_plan
from emb_model_provider.transfer.repository import open_repository
from emb_model_provider.transfer.result import TransferResult, summary
from emb_model_provider.transfer.session import Session, TransferOptions
from emb_model_provider.transfer.verify import compare

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from emb_model_provider.progress import OnProgress
    from emb_model_provider.settings import Settings
    from emb_model_provider.transfer.location import Location
    from emb_model_provider.transfer.plan import Plan

logger = logging.getLogger(__name__)

_POLL_S = 0.2


class Transfer:
    """Copies repositories from Hugging Face to ModelScope, or the other way, or to a directory.

        result = Transfer().run("BAAI/bge-small-zh-v1.5", "my-organization/bge-small-zh-v1.5")

    Files are streamed from one hub to the other and hashed on the way; only those that the destination lacks are sent.
    A transfer that was interrupted continues when it is run again. Tokens and endpoints are those of the settings
    (EMB_PROVIDER_... variables and .env), or of the hubs' own clients. Thread-safe.

    A source is `[hf:|ms:]owner/name[@revision]`, a destination `[hf:|ms:]owner/name` or `dir:PATH`. Without a prefix, a
    source is on Hugging Face, and a destination on the other hub.
    """

    def __init__(self, settings: Settings | None = None, options: TransferOptions | None = None) -> None:
        """Create a transfer, without a request.

        Args:
            settings: All settings. None: they are read from the environment and .env.
            options: How repositories are transferred. None: with default values.
        """
        settings = settings if settings is not None else load_settings()[0]
        self._hubs = settings.hubs
        self._options = options or TransferOptions()
        self._journals = self._hubs.cache_dir / "transfers"

    def run(
        self,
        source: str,
        destination: str,
        *,
        on_progress: OnProgress = ignore_progress,
        cancel: CancelToken | None = None,
    ) -> TransferResult:
        """Transfer a repository, and verify the destination.

        Args:
            source: The repository to copy.
            destination: The repository or directory to copy it to. It is created if it does not exist. Files that only
                the destination has are never removed.
            on_progress: Called from one thread at a time, not always the caller's.
            cancel: Ends the transfer soon after it is cancelled.

        Returns:
            The result, in the state `done` or `same`.

        Raises:
            InvalidTransferError: The source or destination is invalid.
            PermissionRequiredError: The source is gated, non-commercial or private.
            LicenseRequiredError: The source names no license.
            HubError: A hub refuses a request, does not respond, or sends wrong bytes.
            TransferError: The destination differs from the source after the transfer.
            OperationCancelledError: `cancel` was cancelled.
        """
        return self._run(self._pair(source, destination), on_progress, cancel or CancelToken())

    def plan(
        self,
        source: str,
        destination: str,
        *,
        on_progress: OnProgress = ignore_progress,
        cancel: CancelToken | None = None,
    ) -> TransferResult:
        """Return what `run` would do, in the state `planned`, or `same` if there is nothing to do. Changes nothing.

        Raises:
            ProviderError: As `run`.
        """
        return self._plan(self._pair(source, destination), on_progress, cancel or CancelToken())

    def verify(
        self,
        source: str,
        destination: str,
        *,
        on_progress: OnProgress = ignore_progress,
        cancel: CancelToken | None = None,
    ) -> TransferResult:
        """Check the access to both hubs, and compare their files by the listed hashes. Transfers nothing.

        Returns:
            The result, in the state `same` or `differs`.

        Raises:
            ProviderError: A hub refuses a request or does not respond.
        """
        return self._verify(self._pair(source, destination), on_progress, cancel or CancelToken())

    def run_batch(
        self,
        pairs: Path | Iterable[Pair],
        *,
        mode: Literal["run", "plan", "verify"] = "run",
        on_result: Callable[[TransferResult], None] = lambda _: None,
        on_progress: OnProgress = ignore_progress,
        cancel: CancelToken | None = None,
    ) -> list[TransferResult]:
        """Transfer, plan or verify several repositories, one after the other. A failure does not stop the others.

        Args:
            pairs: The path of a list file, or its pairs.
            mode: `run`, `plan` or `verify`.
            on_result: Called with each result.
            on_progress: As in `run`.
            cancel: As in `run`.

        Returns:
            The results in the order of the list. Errors are in the results.

        Raises:
            InvalidTransferError: The list is invalid. Nothing was transferred.
            OperationCancelledError: `cancel` was cancelled.
        """
        cancel = cancel or CancelToken()
        work = {"run": self._run, "plan": self._plan, "verify": self._verify}[mode]
        every = read_pairs(pairs) if isinstance(pairs, Path) else list(pairs)
        results: list[TransferResult] = []
        has_failed = False
        for index, pair in enumerate(every):
            if has_failed and self._options.fail_fast:
                result = TransferResult(source=str(pair.source), destination=str(pair.destination), state="skipped")
            else:
                if index:
                    _pause(self._options.delay_s, cancel)
                result = _as_result(work, pair, on_progress, cancel)
            has_failed |= not result.ok
            results.append(result)
            on_result(result)
        return results

    def job(self, source: Location, destination: Location) -> Callable[[OnProgress, CancelToken], Mapping[str, Any]]:
        """Return the work of a job of the service that does the same as `run`."""

        def work(on_progress: OnProgress, cancel: CancelToken) -> Mapping[str, Any]:
            result = self._run(Pair(source, destination), on_progress, cancel)
            note = f"{len(result.sent)} of {result.files} files were sent, {result.sent_bytes} bytes."
            return {"revision": result.revision, "notes": [note]}

        return work

    # --- one pair -------------------------------------------------------------------------------------

    def _run(self, pair: Pair, on_progress: OnProgress, cancel: CancelToken) -> TransferResult:
        started = time.monotonic()
        session = self._session(pair, on_progress, cancel)
        session.ask_destination(session.destination.require_login, f"logging in for {pair.destination}")
        try:
            plan = make_plan(session)
            result = _describe(pair, plan)
            if not plan.files:
                session.write("verified")
                return replace(result, state="same", seconds=time.monotonic() - started)
            copied = Copier(session, plan).run()
            session.begin("verify")
            listing = session.ask_destination(
                lambda: session.destination.list_files(session.destination.branch), f"listing {pair.destination}"
            )
            comparison = compare(session, (*copied.files, *plan.comparison.same), listing)
        except ProviderError as error:
            session.write("failed", error=describe_error(error))
            raise
        if not comparison.ok:
            names = ", ".join((*comparison.missing, *comparison.different)[:10])
            raise TransferError(
                f"{pair.destination} differs from {pair.source} after the transfer: {names}. Run the same command again."
            )
        session.write("verified")
        sent = tuple(file.path for file in copied.files)
        return replace(
            result, state="done", sent=sent, sent_bytes=copied.sent_bytes, seconds=time.monotonic() - started
        )

    def _plan(self, pair: Pair, on_progress: OnProgress, cancel: CancelToken) -> TransferResult:
        started = time.monotonic()
        session = self._session(pair, on_progress, cancel)
        result = _describe(pair, make_plan(session))
        return replace(result, seconds=time.monotonic() - started)

    def _verify(self, pair: Pair, on_progress: OnProgress, cancel: CancelToken) -> TransferResult:
        started = time.monotonic()
        session = self._session(pair, on_progress, cancel)
        session.ask_destination(session.destination.require_login, f"logging in for {pair.destination}")
        plan = make_plan(session, checks_rights=False)
        result = _describe(pair, plan)
        return replace(
            result,
            state="same" if plan.comparison.ok else "differs",
            created=False,
            sent=(),
            sent_bytes=0,
            missing=plan.comparison.missing,
            different=plan.comparison.different,
            seconds=time.monotonic() - started,
        )

    def _pair(self, source: str, destination: str) -> Pair:
        location = parse_source(source)
        return Pair(location, parse_destination(destination, location))

    def _session(self, pair: Pair, on_progress: OnProgress, cancel: CancelToken) -> Session:
        if self._hubs.offline:
            raise OfflineError(
                "EMB_PROVIDER_OFFLINE forbids requests to the hubs: nothing can be transferred. Unset it."
            )
        source, destination = (open_repository(each, self._hubs) for each in (pair.source, pair.destination))
        return Session(
            (pair.source, pair.destination),
            (source, destination),
            TransferJournal(self._journals, pair.source, pair.destination),
            self._options,
            on_progress,
            cancel,
        )


def write_report(path: Path, results: list[TransferResult]) -> None:
    """Write the results as JSON, the same as the output of `--json`."""
    write_atomically(path, json.dumps(summary(results), indent=1, ensure_ascii=False).encode() + b"\n")


def _describe(pair: Pair, plan: Plan) -> TransferResult:
    return TransferResult(
        source=str(replace(pair.source, revision=None)),
        destination=str(pair.destination),
        state="planned" if plan.files else "same",
        revision=plan.revision,
        created=plan.creates,
        files=len(plan.files) + len(plan.comparison.same),
        sent=tuple(each.file.path for each in plan.files),
        sent_bytes=plan.send_bytes,
        same=len(plan.comparison.same),
        kept=plan.kept,
        extra=plan.extra,
    )


def _as_result(
    work: Callable[[Pair, OnProgress, CancelToken], TransferResult],
    pair: Pair,
    on_progress: OnProgress,
    cancel: CancelToken,
) -> TransferResult:
    """Return the result of one pair of a batch, also if it fails."""
    started = time.monotonic()
    try:
        return work(pair, on_progress, cancel)
    except OperationCancelledError:
        raise
    except Exception as error:
        if not isinstance(error, ProviderError):
            logger.exception("%s failed unexpectedly", pair.source)
        info = error_info(error)
        return TransferResult(
            source=str(replace(pair.source, revision=None)),
            destination=str(pair.destination),
            state="failed",
            error=describe_error(error),
            error_code=info.code,
            exit_code=info.exit_code,
            seconds=time.monotonic() - started,
        )


def _pause(seconds: float, cancel: CancelToken) -> None:
    deadline = time.monotonic() + seconds
    while (left_s := deadline - time.monotonic()) > 0:
        cancel.raise_if_cancelled()
        time.sleep(min(_POLL_S, left_s))
