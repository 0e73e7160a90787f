"""How many requests are made, which, and the tally of what answered them."""

from __future__ import annotations

import json
import socket
from typing import TYPE_CHECKING

import httpx
from hypothesis import HealthCheck, settings

from tests.fuzz.contract import Answer, check

if TYPE_CHECKING:
    from collections import Counter
    from collections.abc import Mapping

    import pytest

    from tests.service import Service

KEY = "sk-fuzz-0123456789"
ORIGIN = "https://app.example"
_CI_EXAMPLES = 240
"""How many requests are generated where no number is asked for; always the same ones."""


def settings_for(config: pytest.Config, share: float) -> settings:
    """Return hypothesis' settings for a test that makes `share` of all examples.

    Where no number was asked for, the same ones are made each time, wherever the test runs.
    """
    asked = config.getoption("--fuzz-examples")
    return settings(
        max_examples=max(1, round(share * (asked or _CI_EXAMPLES))),
        derandomize=asked is None,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        print_blob=True,
    )


class Fuzz:
    """A service, the requests sent to it, and the tally of its answers."""

    def __init__(self, service: Service, tally: Counter[tuple[str, str]], config: pytest.Config) -> None:
        self.service = service
        self._tally = tally
        self._config = config

    def settings(self, share: float) -> settings:
        """Return hypothesis' settings for a test that makes `share` of all requests."""
        return settings_for(self._config, share)

    def post(self, body: bytes, headers: Mapping[str, str] | None = None) -> Answer:
        """POST a body as it stands, and check its answer against all that holds for every answer."""
        given = {"content-type": "application/json"} if headers is None else headers
        answer = Answer.of(self.service.http.post("/v1/embeddings", content=body, headers=given))
        self.note("POST /v1/embeddings", answer)
        check(answer)
        return answer

    def note(self, operation: str, answer: Answer | None) -> None:
        """Count an answer, or a connection that was closed or left waiting without one."""
        outcome = "no answer" if answer is None else f"{answer.status} {_code(answer)}".strip()
        self._tally[operation, outcome] += 1

    def connect(self) -> socket.socket:
        return socket.create_connection(("localhost", self.service.port), timeout=120)

    def assert_alive(self) -> None:
        """Check, over a connection of its own, that the process is there and its model answers."""
        with httpx.Client(
            base_url=self.service.url, headers=self.service.http.headers, trust_env=False
        ) as http:
            response = http.post("/v1/embeddings", json={"input": "hello"}, timeout=120)
        assert response.status_code == 200, response.text
        assert self.service.process.poll() is None


def _code(answer: Answer) -> str:
    if answer.status < 400:
        return ""
    try:
        return str(json.loads(answer.body)["error"]["code"])
    except (ValueError, LookupError, TypeError):
        return "?"
