"""The tools that read the files of `deploy/`: docker compose, nginx, Caddy, Helm and parsers, as packages of Python."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.clients.isolated import Environment

SCRIPTS = Path(__file__).with_name("isolated")


@pytest.fixture(scope="session")
def tools(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """Return the environment of `isolated/deploy.txt`."""
    return Environment("deploy", tmp_path_factory.mktemp("deploy"), {}, SCRIPTS)
