"""`emb-provider doctor`: is this machine fit, and if not, what to do about it."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Literal

import click

from emb_model_provider.cli.options import json_option
from emb_model_provider.cli.output import out, print_json, say, styled
from emb_model_provider.error_table import FAILED
from emb_model_provider.errors import SettingsError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from emb_model_provider.settings import Settings


_SHOWN = {"ok": ("ok  ", "green"), "warn": ("warn", "yellow"), "fail": ("FAIL", "red")}


@click.command()
@json_option
def doctor(*, as_json: bool) -> None:
    """Check this machine, and say what to do.

    Packages, processor, memory, CUDA, settings, disk, permissions, port, hubs, tokens, models. A line each: ok, warn
    or FAIL, what was found, and what to do. The exit status is 1 if anything fails.

    JSON: {"ok", "checks": [{check, level: ok, warn or fail, found, advice}]}.
    """
    findings: list[CheckResult] = []
    for finding in _findings():
        findings.append(finding)
        if not as_json:
            _print(finding)
    failed = [finding for finding in findings if finding.level == "fail"]
    if as_json:
        print_json({"ok": not failed, "checks": [asdict(finding) for finding in findings]})
    elif failed:
        say(f"{len(failed)} of {len(findings)} checks failed.")
    if failed:
        raise SystemExit(FAILED)


def _findings() -> Iterator[CheckResult]:
    """Check one thing after the other; those that need settings only where these can be read."""
    # The client's own setting, read when it is first imported: five tries take longer than anybody waits for this.
    os.environ.setdefault("MODELSCOPE_API_MAX_RETRIES", "1")
    from emb_model_provider.cli.doctor import disk, machine, service
    from emb_model_provider.settings.loading import load_settings

    plain: tuple[Callable[[], Iterable[CheckResult]], ...] = (
        machine.check_python,
        machine.check_packages,
        machine.check_processor,
        machine.check_memory,
    )
    for check in plain:
        yield from check()
    try:
        settings, warnings = load_settings()
    except SettingsError as error:
        yield CheckResult(
            "settings", "fail", error.message, "Mend it, and ask again: the other checks need it."
        )
        return
    yield CheckResult("settings", "ok", _told(settings))
    for warning in warnings:
        yield CheckResult("settings", "warn", warning, "Rename or remove it.")
    for on_settings in (
        machine.check_cuda,
        disk.check_directories,
        service.check_port,
        service.check_hubs,
        service.check_models,
    ):
        yield from on_settings(settings)


def _told(settings: Settings) -> str:
    aliases = [spec.alias for spec in settings.models.specs()]
    return f"valid; {'a model' if len(aliases) == 1 else f'{len(aliases)} models'}: {', '.join(aliases)}"


def _print(finding: CheckResult) -> None:
    label, color = _SHOWN[finding.level]
    out(f"{styled(label, fg=color)}  {finding.check}: {finding.found}")
    if finding.advice:
        out(f"      {finding.advice}")


Level = Literal["ok", "warn", "fail"]


@dataclass(frozen=True, slots=True)
class CheckResult:
    """One line of the doctor's."""

    check: str
    level: Level
    """fail: something that is configured cannot work; warn: it works, and could be better, or might not some day."""
    found: str
    advice: str = ""
    """What to do: a command to type or a setting; empty where nothing is to be done."""
