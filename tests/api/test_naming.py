"""Which models may be named over HTTP."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from emb_model_provider.api.routes.loaded_models import resolve_requested_model
from emb_model_provider.api.schemas.management import LoadQuery
from emb_model_provider.errors import NotAllowedError
from emb_model_provider.settings import MappingEntry, Settings, TrustSettings

if TYPE_CHECKING:
    from pathlib import Path


def settings(**mapping: MappingEntry) -> Settings:
    return Settings.from_values(
        model_mapping=mapping, trust_remote_code=True, modelscope_trust_remote_code=True
    )


def test_directory_is_one_of_the_settings_or_none(tmp_path: Path) -> None:
    """Under an alias of the settings a directory may be loaded, in any way; by its path it may not."""
    ours, other = tmp_path / "ours", tmp_path / "other"
    ours.mkdir()
    other.mkdir()
    known = settings(ours=MappingEntry(name="ours", path=ours))
    assert resolve_requested_model(known, LoadQuery(model_name="ours", precision="int8"), "x").path == ours
    for name in (str(other), f"{ours}/../other", "/nowhere/at/all"):
        with pytest.raises(NotAllowedError):
            resolve_requested_model(known, LoadQuery(model_name=name))


@pytest.mark.parametrize(
    "query",
    [
        LoadQuery(model_name="a/unknown"),
        LoadQuery(model_name="damo/unknown"),
        LoadQuery(model_name="a/b", revision="a-branch-of-somebody"),
        LoadQuery(model_name="a/b", source="modelscope"),
    ],
    ids=str,
)
def test_code_never_runs_for_what_the_settings_do_not_name(query: LoadQuery) -> None:
    """However much the settings trust: another repository, revision or hub is not what they were written for."""
    spec = resolve_requested_model(settings(b=MappingEntry(name="a/b")), query)
    assert not TrustSettings(modelscope_trust_remote_code=True, trust_remote_code=True).allows(
        spec, "huggingface"
    )


def test_trust_of_the_settings_stays_theirs() -> None:
    """A model of the settings is trusted as they say, under another alias or precision too."""
    known = settings(b=MappingEntry(name="a/b", trust_remote_code=True), c=MappingEntry(name="a/c"))
    assert (
        resolve_requested_model(known, LoadQuery(model_name="b", precision="fp32"), "other").trust_remote_code
        is True
    )
    assert resolve_requested_model(known, LoadQuery(model_name="a/c")).trust_remote_code is None
