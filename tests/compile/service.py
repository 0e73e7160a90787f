"""A service that prepares one small model, over a child that only pretends to compile."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

from emb_model_provider.artifacts.prepare import PreparedBackend, prepare_backend
from emb_model_provider.backends.base import TokenBatch
from tests.models import snapshot_of, spec_of

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import pytest

    from tests.compile.conftest import Compiled

FAMILY = "bert-mean-normalize"
ONE_TOKEN = TokenBatch(ids=[[5]], prompt_lengths=[0])


class Service:
    """Prepares one small model as a service does, over a child that only pretends to compile."""

    def __init__(self, made: Compiled, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made, self.root, self.cache = made, root, root / "cache"
        self.log = root / "starts"
        self.directory = made.directory
        self.max_bytes = 10**9
        self.announced = 0
        self._monkeypatch = monkeypatch
        monkeypatch.setattr(
            "emb_model_provider.artifacts.compiler_process.COMMAND",
            (sys.executable, "-m", "tests.compile.fake_child"),
        )
        self.child_does()

    def child_does(self, **told: Any) -> None:
        told = {"copy": str(self.made.artifact.directory), "log": str(self.log), **told}
        self._monkeypatch.setenv("FAKE_CHILD", json.dumps(told))

    @property
    def starts(self) -> int:
        return len(self.log.read_text().splitlines()) if self.log.exists() else 0

    def prepare(self, *, stopped: Callable[[], bool] = lambda: False, **spec: Any) -> PreparedBackend:
        def announce() -> None:
            self.announced += 1

        return prepare_backend(
            spec_of(**spec),
            snapshot_of(self.directory),
            trust_remote_code=False,
            cache_dir=self.cache,
            max_cache_bytes=self.max_bytes,
            on_compiling=announce,
            stopped=stopped,
        )

    @property
    def artifacts(self) -> list[Path]:
        return sorted(path for path in (self.cache / "artifacts").iterdir() if path.is_dir())
