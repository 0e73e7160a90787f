"""Checks of this machine and of what the settings need, each with what to do about a problem."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Iterator

    from emb_model_provider.settings import Settings

Level = Literal["ok", "warn", "fail"]


@dataclass(frozen=True, slots=True)
class CheckResult:
    """The result of one check."""

    check: str
    level: Level
    """fail: something that is configured cannot work. warn: it works, but not well or not in every case."""
    found: str
    advice: str = ""
    """What to do, such as a command or a setting; empty if there is nothing to do."""


def check_machine() -> Iterator[CheckResult]:
    """Check packages, processor and memory."""
    from emb_model_provider.doctor import machine

    yield from machine.check_python()
    yield machine.check_processor()
    yield machine.check_memory()


def check_setup(settings: Settings) -> Iterator[CheckResult]:
    """Check CUDA, disk, permissions, hubs, tokens and models. Sends requests to the hubs."""
    from emb_model_provider.doctor import machine, service

    yield machine.check_cuda(settings)
    yield from machine.check_directories(settings)
    yield from service.check_hubs(settings)
    yield from service.check_models(settings)
