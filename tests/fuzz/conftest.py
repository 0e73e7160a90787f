"""The service that is fuzzed, and a summary of the requests and their responses."""

from __future__ import annotations

import json
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest

from tests.fuzz.bodies import CLASSIFIER, FREE, MAX_INPUTS, MAX_TOKENS, PLAIN, RERANKER
from tests.fuzz.fuzzing import KEY, ORIGIN, Fuzz
from tests.kind_models import CLASSIFIERS, RERANKERS
from tests.service import BUNDLED, Service

if TYPE_CHECKING:
    from collections.abc import Iterator

_TALLY = pytest.StashKey[Counter[tuple[str, str]]]()


@pytest.fixture(scope="session")
def fuzz(
    tmp_path_factory: pytest.TempPathFactory, service_cache: str, backend: str, pytestconfig: pytest.Config
) -> Iterator[Fuzz]:
    """Yield a service with a key, CORS, low limits and several models, so that requests can be rejected for many reasons."""
    directory = tmp_path_factory.mktemp("fuzz-models")
    mapping: dict[str, dict[str, Any]] = {
        PLAIN: {"name": BUNDLED},
        FREE: {
            "name": BUNDLED,
            "dimensions": "any",
            "prompts": {"query": "query: ", "document": "passage: "},
            "token_input": "model",
        },
        **{
            name: {"name": f"test/{name}", "path": str(save(directory / name)), "backend": "torch", "device": "cpu"}
            for name, save in ((RERANKER, RERANKERS["bert"]), (CLASSIFIER, CLASSIFIERS["bert"]))
        },
    }
    settings: dict[str, Any] = {
        "CACHE_DIR": service_cache,
        "BACKEND": backend,
        "API_KEYS": KEY,
        "CORS_ORIGINS": ORIGIN,
        "MODEL_MAPPING": json.dumps(mapping),
        "MAX_INPUTS": str(MAX_INPUTS),
        "MAX_REQUEST_TOKENS": str(MAX_TOKENS),
        "MAX_BODY_MB": "0.25",
    }
    tally = pytestconfig.stash.setdefault(_TALLY, Counter())
    with Service(tmp_path_factory.mktemp("fuzz"), **settings) as started:
        started.http.headers["authorization"] = f"Bearer {KEY}"
        yield Fuzz(started.wait(), tally, pytestconfig)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Show how many requests were sent, by operation and response."""
    tally = config.stash.get(_TALLY, Counter())
    if not tally:
        return
    terminalreporter.section("fuzz")
    for (operation, outcome), count in sorted(tally.items()):
        terminalreporter.write_line(f"{count:7} {operation:28} {outcome}")
    terminalreporter.write_line(f"{tally.total():7} in total")
