"""`emb-provider transfer`: copies repositories from one hub to another."""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from emb_model_provider.cli import options
from emb_model_provider.cli.interrupt import run_until_interrupted
from emb_model_provider.cli.output import out, pairs, print_json, say, show_progress
from emb_model_provider.error_table import FAILED
from emb_model_provider.formatting import format_duration, format_size
from emb_model_provider.progress import CancelToken, Mode

if TYPE_CHECKING:
    from collections.abc import Iterator

    from emb_model_provider.transfer.result import TransferResult

_MAX_NAMES_SHOWN = 10
_RESUME_HINT = "what was sent so far is kept. To continue, run the same command again."


@click.command()
@click.argument("source", required=False, metavar="[SRC")
@click.argument("destination", required=False, metavar="DST]")
@click.option("--batch", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE",
              help="Transfer the repositories of a list: SRC and DST in each line, # begins a comment.")  # fmt: skip
@click.option(
    "--verify-only", is_flag=True, help="Transfer nothing: check the access to both hubs, and compare the files."
)
@click.option("--dry-run", is_flag=True, help="Show what would be sent, and send nothing.")
@click.option("--license", "license_id", metavar="ID", help="License of a new repository. Default: that of the source.")
@click.option("--commit-message", metavar="TEXT", help="Default: Mirror of owner/name@commit.")
@click.option(
    "--jobs", type=click.IntRange(1, 64), default=4, show_default=True, help="Files that are sent in parallel."
)
@click.option("--delay", type=click.FloatRange(0, 86_400), default=0.0, metavar="SECONDS",
              help="Pause between two repositories of a list, against rate limits.")  # fmt: skip
@click.option("--spool", type=click.Path(file_okay=False, path_type=Path), metavar="DIR",
              help="Store large files in DIR until they are sent, to resume them. Needs up to JOBS times the largest "
              "file. Default: nothing is stored.")  # fmt: skip
@click.option("--fail-fast", is_flag=True, help="End after the first repository of a list that fails.")
@click.option("--i-have-permission", is_flag=True,
              help="Transfer gated, non-commercial and private repositories, because their owners allow it.")  # fmt: skip
@click.option("--overwrite-card", is_flag=True,
              help="Replace the front matter of README.md and configuration.json of the destination.")  # fmt: skip
@click.option("--report", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE",
              help="Also write the JSON output to FILE, after each repository.")  # fmt: skip
@click.option("--log-level", type=click.Choice(["DEBUG", "INFO", "WARNING", "ERROR"], case_sensitive=False),
              help="Also write log lines of this level to stderr.")  # fmt: skip
@options.progress
@options.json
def transfer(
    source: str | None,
    destination: str | None,
    batch: Path | None,
    license_id: str | None,
    commit_message: str | None,
    jobs: int,
    delay: float,
    spool: Path | None,
    report: Path | None,
    log_level: str | None,
    progress: Mode,
    *,
    verify_only: bool,
    dry_run: bool,
    fail_fast: bool,
    i_have_permission: bool,
    overwrite_card: bool,
    as_json: bool,
) -> None:
    """Copy a repository to another hub.

    SRC is owner/name[@REV] on Hugging Face, or ms:owner/name[@REV] on ModelScope. DST is owner/name on the other hub, or
    dir:PATH. Files are streamed, without disk, and only those that DST lacks are sent. DST is created if necessary, then
    verified; nothing in it is deleted. Run the same command again to continue. Guide:
    docs/HF-to-ModelScope-Transfer.md.

    JSON: {"ok", "succeeded", "failed", "sent_bytes", "transfers": [{source, destination, state, revision, created,
    files, sent, sent_bytes, same, kept, extra, missing, different, error, error_code, seconds}]}.
    """
    from emb_model_provider.transfer.batch import Pair, read_pairs
    from emb_model_provider.transfer.location import parse_destination, parse_source
    from emb_model_provider.transfer.session import TransferOptions
    from emb_model_provider.transfer.transfer import Transfer, write_report

    if verify_only and dry_run:
        raise click.UsageError("--verify-only and --dry-run exclude each other.")
    mode: Literal["run", "plan", "verify"] = "verify" if verify_only else "plan" if dry_run else "run"
    if batch is not None:
        if source is not None:
            raise click.UsageError("--batch FILE replaces SRC and DST: remove one.")
        wanted = read_pairs(batch)
    elif source is None or destination is None:
        raise click.UsageError("Name a source and a destination, or a list with --batch FILE.")
    else:
        location = parse_source(source)
        wanted = [Pair(location, parse_destination(destination, location))]
    choices = TransferOptions(
        license=license_id,
        commit_message=commit_message,
        jobs=jobs,
        delay_s=delay,
        spool=spool.absolute() if spool is not None else None,
        fail_fast=fail_fast,
        has_permission=i_have_permission,
        overwrite_card=overwrite_card,
    )
    worker = Transfer(options.open_settings(), choices)
    if report is not None:
        write_report(report, [])  # fails before hours of work, not after them
    cancel = CancelToken()
    results: list[TransferResult] = []

    def work() -> None:
        with _log_lines(log_level), show_progress(progress) as reporter:

            def on_result(result: TransferResult) -> None:
                results.append(result)
                if report is not None:
                    write_report(report, results)
                if len(wanted) > 1:
                    reporter.note(_line(result, len(results), len(wanted)))

            worker.run_batch(wanted, mode=mode, on_result=on_result, on_progress=reporter, cancel=cancel)

    def stop() -> float:
        cancel.cancel()
        return 0.0

    run_until_interrupted(work, _RESUME_HINT, stop=stop)
    _print(results, as_json=as_json)
    failed = [result for result in results if not result.ok]
    if failed:
        raise SystemExit(failed[0].exit_code or FAILED if len(wanted) == 1 else FAILED)


def _line(result: TransferResult, number: int, count: int) -> str:
    text = f"[{number}/{count}] {result.source} -> {result.destination}: {result.state}"
    if result.error is not None:
        return f"{text}: {result.error}"
    return f"{text}, {format_size(result.sent_bytes)} sent" if result.state == "done" else text


def _print(results: list[TransferResult], *, as_json: bool) -> None:
    from emb_model_provider.transfer.result import summary

    if as_json:
        print_json(summary(results))
    elif len(results) == 1:
        _print_one(results[0])
    else:
        for result in results:
            out(f"{result.state}\t{result.source}\t{result.destination}")
        total = summary(results)
        say(f"{total['succeeded']} succeeded, {total['failed']} failed, {format_size(total['sent_bytes'])} sent.")
    if len(results) == 1 and results[0].error is not None:
        say(f"Error: {results[0].error}")


def _print_one(result: TransferResult) -> None:
    out(f"{result.source} -> {result.destination}: {result.state}")
    if result.state == "failed":
        return
    sent = f"{len(result.sent)} files, {format_size(result.sent_bytes)}"
    rows = [
        ("revision", str(result.revision)),
        ("files", f"{result.files}, of which the destination had {result.same}"),
        ("to send", sent if result.state == "planned" else ""),
        ("sent", sent if result.state == "done" else ""),
        ("created", "yes" if result.created else ""),
        ("kept", _names(result.kept)),
        ("only there", _names(result.extra)),
        ("missing", _names(result.missing)),
        ("different", _names(result.different)),
        ("time", format_duration(result.seconds)),
    ]
    out(pairs([(name, value) for name, value in rows if value]))


def _names(names: tuple[str, ...]) -> str:
    more = f" and {len(names) - _MAX_NAMES_SHOWN} more" if len(names) > _MAX_NAMES_SHOWN else ""
    return ", ".join(names[:_MAX_NAMES_SHOWN]) + more


@contextlib.contextmanager
def _log_lines(level: str | None) -> Iterator[None]:
    """Write the log lines of this package to stderr, unless the level is None."""
    logger = logging.getLogger("emb_model_provider")
    if level is None:
        yield
        return
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    before = logger.level
    logger.setLevel(level.upper())
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)
