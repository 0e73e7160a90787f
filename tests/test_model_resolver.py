"""Names of models while models are added and removed. See tests/management for names of models on disk."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from emb_model_provider.model_resolver import build_alias_index
from emb_model_provider.model_spec import ModelSpec, name_of_directory

if TYPE_CHECKING:
    from pathlib import Path


def spec(name: str, alias: str | None = None) -> ModelSpec:
    return ModelSpec(alias=alias or name, name=name)


def test_added_model_does_not_change_earlier_names() -> None:
    """Earlier names keep their meaning, ambiguous or not. The name of a removed model can be used again."""
    configured = [spec("acme/small"), spec("x/twin"), spec("y/twin")]
    added = [spec("acme/small", alias="small-int8"), spec("other/small"), spec("z/twin"), spec("p/new"), spec("q/new")]
    names = build_alias_index(configured, added)
    assert names["small"] == names["acme/small"] == "acme/small"
    assert "twin" not in names
    assert names["new"] == "p/new"
    assert (names["q/new"], names["small-int8"]) == ("q/new", "small-int8")
    assert build_alias_index(configured, added[4:])["new"] == "q/new"


@pytest.mark.parametrize(
    ("directory", "name"),
    [
        ("hub/models--BAAI--bge-m3/snapshots/5617a9f61b028005a4858fdac845db406aefb181", "BAAI/bge-m3"),
        ("hub/models--BAAI--bge-m3", "BAAI/bge-m3"),
        ("modelscope/models/iic--gte-base/snapshots/master", "iic/gte-base"),
        ("models/my--model", "my--model"),
        ("models/bge-m3", "bge-m3"),
    ],
)
def test_a_directory_of_a_cache_has_the_name_of_its_repository(tmp_path: Path, directory: str, name: str) -> None:
    """And not that of a commit or a branch."""
    (tmp_path / directory).mkdir(parents=True)
    assert name_of_directory(tmp_path / directory) == name
