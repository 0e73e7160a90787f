"""`emb-provider doctor`: checks this machine, and says what to do about problems."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Literal

import click

from emb_model_provider.cli import options
from emb_model_provider.cli.output import out, print_json, say, styled
from emb_model_provider.error_table import FAILED
from emb_model_provider.errors import SettingsError

if TYPE_CHECKING:
    from collections.abc import Iterator

Level = Literal["ok", "warn", "fail"]

_LABELS = {"ok": ("ok  ", "green"), "warn": ("warn", "yellow"), "fail": ("FAIL", "red")}


@dataclass(frozen=True, slots=True)
class CheckResult:
    """The result of one check."""

    check: str
    level: Level
    """fail: something that is configured cannot work. warn: it works, but not well or not in every case."""
    found: str
    advice: str = ""
    """What to do, such as a command or a setting; empty if there is nothing to do."""


@click.command()
@options.json
def doctor(*, as_json: bool) -> None:
    """Check this machine, and suggest what to do.

    Checks packages, processor, memory, CUDA, settings, disk, permissions, port, hubs, tokens and models. Prints a line
    per check: ok, warn or FAIL, what was found, and what to do. The exit code is 1 if a check fails.

    JSON: {"ok", "checks": [{check, level: ok, warn or fail, found, advice}]}.
    """
    results: list[CheckResult] = []
    for result in _run_checks():
        results.append(result)
        if not as_json:
            _print(result)
    failed = [result for result in results if result.level == "fail"]
    if as_json:
        print_json({"ok": not failed, "checks": [asdict(result) for result in results]})
    elif failed:
        say(f"{len(failed)} of {len(results)} checks failed.")
    if failed:
        raise SystemExit(FAILED)


def _run_checks() -> Iterator[CheckResult]:
    # A setting of ModelScope's client, which it reads when it is imported: its default of five tries takes too long.
    os.environ.setdefault("MODELSCOPE_API_MAX_RETRIES", "1")
    from emb_model_provider.cli.doctor import machine, service
    from emb_model_provider.settings.loading import load_settings, overridden_names

    yield from machine.check_python()
    yield machine.check_processor()
    yield machine.check_memory()
    try:
        settings, warnings = load_settings()
    except SettingsError as error:
        advice = "Correct the setting, and run doctor again: the remaining checks need the settings."
        for line in error.message.splitlines():
            yield CheckResult("settings", "fail", line, advice)
        return
    aliases = [spec.alias for spec in settings.models.specs()]
    found = f"valid; {len(aliases)} model{'s' if len(aliases) > 1 else ''}: {', '.join(aliases)}"
    yield CheckResult("settings", "ok", found)
    for warning in warnings:
        yield CheckResult("settings", "warn", warning, "Rename or remove it.")
    for name in overridden_names():
        found = f"the value of {name} in .env is not used, because the environment has another one"
        yield CheckResult("settings", "warn", found, "Remove one of the two. A container sets it with -e.")
    yield machine.check_cuda(settings)
    yield from machine.check_directories(settings)
    yield service.check_port(settings)
    yield from service.check_hubs(settings)
    yield from service.check_models(settings)


def _print(result: CheckResult) -> None:
    label, color = _LABELS[result.level]
    out(f"{styled(label, fg=color)}  {result.check}: {result.found}")
    if result.advice:
        out(f"      {result.advice}")
