"""`/console/settings`: the effective settings, where their values come from, and the checks of this machine."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter
from starlette.responses import Response

from emb_model_provider.api.console.page import ConsoleRoute, PageDep
from emb_model_provider.doctor import CheckResult, check_machine, check_setup
from emb_model_provider.settings import PREFIX, Settings

if TYPE_CHECKING:
    from collections.abc import Sequence

PATH = "/console/settings"

_CREDENTIALS = re.compile(r"(?<=://)[^/@\s\"]+(?=@)")
"""User and password in a URL."""

router = APIRouter(route_class=ConsoleRoute, include_in_schema=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class ShownSetting:
    """A setting with its effective value."""

    variable: str
    value: str
    """As text; empty if it is unset. Secrets are masked."""
    origin: str | None
    """The variable that the value comes from, with the file if it is in one; None: the default."""


@router.get(PATH)
async def settings(page: PageDep) -> Response:
    return page.render("settings.html", groups=_shown(page.services.settings), checks=None)


@router.post(f"{PATH}/checks")
async def check(page: PageDep) -> Response:
    settings = page.services.settings

    def run() -> Sequence[CheckResult]:
        return [*check_machine(), *check_setup(settings)]

    checks = await page.services.in_disk_thread(run)
    if page.is_partial:
        return page.render("_checks.html", checks=checks)
    return page.render("settings.html", groups=_shown(settings), checks=checks)


def _shown(settings: Settings) -> Sequence[tuple[str, Sequence[ShownSetting]]]:
    """Return the title and the settings of each group."""
    groups = []
    for name, kind in Settings.groups().items():
        values = getattr(settings, name).model_dump(mode="json")
        shown = [
            ShownSetting(
                variable=f"{PREFIX}{setting.upper()}", value=_as_text(value), origin=settings.origins.get(setting)
            )
            for setting, value in values.items()
        ]
        groups.append((kind.model_config["title"] or name, shown))
    return groups


def _as_text(value: Any) -> str:
    """Return a value of JSON, in which pydantic has masked secrets, as it is written in a setting."""
    if value is None:
        return ""
    if isinstance(value, dict):
        entries = {key: _without_defaults(entry) for key, entry in value.items()}
        text = json.dumps(entries, ensure_ascii=False, indent=2) if entries else ""
    elif isinstance(value, list):
        text = ",".join(map(str, value))
    elif isinstance(value, float):
        text = f"{value:g}"
    else:
        text = str(value).lower() if isinstance(value, bool) else str(value)
    return _CREDENTIALS.sub("***", text)


def _without_defaults(entry: Any) -> Any:
    return {key: value for key, value in entry.items() if value not in (None, [])} if isinstance(entry, dict) else entry
