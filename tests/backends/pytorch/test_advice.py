"""Errors of the libraries become messages that name the model and say what to do."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from emb_model_provider.backends.pytorch.backend import TorchBackend
from emb_model_provider.errors import LoadError
from tests.models import snapshot_of, spec_of

if TYPE_CHECKING:
    from collections.abc import Callable


def edit_config(directory: Path, **values: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def unknown_type(directory: Path) -> None:
    edit_config(directory, model_type="homemade")


def no_type(directory: Path) -> None:
    (directory / "config.json").write_text("{}")


def damaged_weights(directory: Path) -> None:
    (directory / "model.safetensors").write_bytes(b"\xff" * 4096)


def truncated_weights(directory: Path) -> None:
    weights = directory / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-64])


def other_sizes(directory: Path) -> None:
    edit_config(directory, hidden_size=32)


def no_tokenizer(directory: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (directory / name).unlink(missing_ok=True)


@pytest.mark.parametrize(
    ("damage", "advice"),
    [
        (unknown_type, r"the model type 'homemade'.*upgrade.*EMB_PROVIDER_TRUST_REMOTE_CODE"),
        (no_type, "no model_type.*choose another repository"),
        (damaged_weights, "damaged.*Download the model again"),
        (truncated_weights, "damaged.*Download the model again"),
        (other_sizes, r"sizes that its config\.json declares"),
        (no_tokenizer, r"no tokenizer.*tokenizer\.json"),
    ],
)
def test_the_message_names_the_model_and_the_remedy(
    damage: Callable[[Path], None], advice: str, family_directory: Callable[[str], Path], tmp_path: Path
) -> None:
    """And no directory of this machine."""
    directory = Path(shutil.copytree(family_directory("bert-mean-normalize"), tmp_path / "0123abcd"))
    damage(directory)
    with pytest.raises(LoadError, match=rf"^someone/model.*{advice}") as error:
        TorchBackend(spec_of(), snapshot_of(directory, repository="someone/model"), trust_remote_code=False)
    assert str(directory.parent) not in str(error.value)
    assert "0123abcd" not in str(error.value)
