"""`emb-provider doctor`: checks this machine and the settings, and says what to do about problems."""

from __future__ import annotations

import os
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from emb_model_provider.cli import options
from emb_model_provider.cli.output import out, print_json, say, styled
from emb_model_provider.doctor import CheckResult, check_machine, check_setup
from emb_model_provider.error_table import FAILED
from emb_model_provider.errors import SettingsError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from emb_model_provider.settings import Settings

_HEALTH_TIMEOUT_S = 3.0
_LABELS = {"ok": ("ok  ", "green"), "warn": ("warn", "yellow"), "fail": ("FAIL", "red")}


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
    from emb_model_provider.settings.loading import load_settings, overridden_names

    yield from check_machine()
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
    yield check_port(settings)
    yield from check_setup(settings)


def check_port(settings: Settings) -> CheckResult:
    """Check that the port is free, or that this service listens on it."""
    from emb_model_provider.main import listen

    server = settings.server
    address = f"{server.host}:{server.port}"
    try:
        sockets = listen(server)
    except SettingsError as error:
        if _is_this_service(server.local_url):
            return CheckResult("port", "ok", f"{address}: the service is running")
        return CheckResult("port", "fail", f"{address} is not available", error.message)
    for listening in sockets:
        listening.close()
    return CheckResult("port", "ok", f"{address} is free")


def _is_this_service(url: str) -> bool:
    import httpx

    try:
        response = httpx.get(f"{url}/health", timeout=_HEALTH_TIMEOUT_S, trust_env=False)
        return bool(response.json() == {"status": "ok"})
    except (httpx.HTTPError, ValueError):
        return False


def _print(result: CheckResult) -> None:
    label, color = _LABELS[result.level]
    out(f"{styled(label, fg=color)}  {result.check}: {result.found}")
    if result.advice:
        out(f"      {result.advice}")
