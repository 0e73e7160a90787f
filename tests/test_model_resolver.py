"""Names of models while models are added and removed. See tests/management for names of models on disk."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from emb_model_provider.model_resolver import NameIndex, ResolvedName, resolve_model
from emb_model_provider.model_spec import ModelSpec, name_of_directory
from emb_model_provider.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path


def spec(name: str, alias: str | None = None, **more_aliases: str | None) -> ModelSpec:
    return ModelSpec(alias=alias or name, name=name, more_aliases=more_aliases)


def aliases_of(names: NameIndex, *requested: str) -> list[str | None]:
    """Return the alias that each name refers to, without regard to similar names."""
    return [found.alias if (found := names.find(name)) is not None else None for name in requested]


def similar_aliases_of(names: NameIndex, *requested: str) -> list[str | None]:
    return [found.alias if (found := names.find_similar(name)) is not None else None for name in requested]


def mapped(mapping: Mapping[str, object]) -> Settings:
    return Settings.from_values(model_mapping=mapping)


def test_added_model_does_not_change_earlier_names() -> None:
    """Earlier names keep their meaning, ambiguous or not. The name of a removed model can be used again."""
    configured = [spec("acme/small"), spec("x/twin"), spec("y/twin")]
    added = [spec("acme/small", alias="small-int8"), spec("other/small"), spec("z/twin"), spec("p/new"), spec("q/new")]
    names = NameIndex(configured, added)
    assert aliases_of(names, "small", "acme/small") == ["acme/small", "acme/small"]
    assert aliases_of(names, "twin", "new") == [None, "p/new"]
    assert aliases_of(names, "q/new", "small-int8") == ["q/new", "small-int8"]
    assert similar_aliases_of(names, "SMALL", "New", "TWIN") == ["acme/small", "p/new", None]
    assert aliases_of(NameIndex(configured, added[4:]), "new") == ["q/new"]


def test_alias_of_an_added_model_is_never_ambiguous() -> None:
    """A model can be added under a name that was ambiguous before."""
    names = NameIndex([spec("x/twin"), spec("y/twin")], [spec("z/other", alias="twin")])
    assert aliases_of(names, "twin") == similar_aliases_of(names, "Twin") == ["twin"]


def test_aliases_of_one_model_leave_its_short_name_unique() -> None:
    """A short name is ambiguous only if it belongs to several models, whatever their number of aliases."""
    fast, exact = spec("acme/model", alias="fast"), replace(spec("acme/model", alias="exact"), precision="fp32")
    assert aliases_of(NameIndex([fast, exact]), "model", "acme/model", "exact") == ["fast", "fast", "exact"]
    assert aliases_of(NameIndex([fast, exact, spec("other/model")]), "model", "acme/model") == [None, "fast"]


@pytest.mark.parametrize(
    "name",
    ["bge-m3:latest", "openai/bge-m3", "openai/bge-m3:latest", "BGE-M3", "BAAI/BGE-m3:latest", "openai/BAAI/bge-m3"],
)
def test_spellings_of_clients_are_understood(name: str) -> None:
    """Ollama's clients add a tag, LiteLLM adds a provider, and users change the case."""
    names = NameIndex([spec("BAAI/bge-m3"), spec("other/model")])
    assert names.find(name) is None
    assert names.find_similar(name) == ResolvedName("BAAI/bge-m3", "BAAI/bge-m3")


def test_exact_names_take_precedence_over_similar_ones() -> None:
    """Case, tags and prefixes matter if there are models whose names differ only in them."""
    served = [spec("x/Model"), spec("y/model"), spec("z/model:latest"), spec("openai/clip"), spec("acme/clip")]
    names = NameIndex(served)
    assert aliases_of(names, "Model", "model", "model:latest") == ["x/Model", "y/model", "z/model:latest"]
    assert similar_aliases_of(names, "MODEL", "openai/clip", "Openai/Clip") == [None, "openai/clip", "openai/clip"]


def test_names_for_queries_and_passages() -> None:
    """NAME-query and NAME-passage are names of a model, unless a model has this name itself."""
    names = NameIndex([spec("acme/e5"), spec("acme/dpr"), spec("acme/dpr-query")])
    assert names.find_similar("e5-query") == ResolvedName("acme/e5", "acme/e5", "query", needs_prompts=True)
    assert names.find_similar("acme/E5-Passage") == ResolvedName("acme/e5", "acme/e5", "document", needs_prompts=True)
    assert names.find_similar("dpr-query") == ResolvedName("acme/dpr-query", "acme/dpr-query")
    for unknown in ("e6-query", "e5-document", "-query", "query"):
        assert names.find_similar(unknown) is None


def test_entries_that_differ_only_in_aliases_are_one_model() -> None:
    """Several aliases share one model in memory, each with its own input_type. The id has none."""
    settings = mapped(
        {
            "bge": {"name": "acme/bge", "aliases": ["m3", "text-embedding-3-small"]},
            "bge-query": {"name": "acme/bge", "input_type": "query"},
            "bge-exact": {"name": "acme/bge", "precision": "fp32"},
        }
    )
    one, other = settings.models.specs()
    assert one.aliases == ("bge", "m3", "text-embedding-3-small", "bge-query")
    assert other.aliases == ("bge-exact",)
    names = NameIndex([one, other])
    assert names.find("bge-query") == ResolvedName("bge", "bge-query", "query")
    assert names.find("m3") == ResolvedName("bge", "m3")
    assert names.find("acme/bge") == ResolvedName("bge", "bge")
    assert resolve_model(settings, "bge-query") == one
    assert resolve_model(settings, "acme/bge", alias="m3") == one
    renamed = resolve_model(settings, "acme/bge", alias="new")
    assert (renamed.aliases, renamed.input_type) == (("new",), None)


def test_preload_accepts_each_alias() -> None:
    """A model is loaded at startup once, whichever of its aliases are named."""
    entry = {"name": "acme/bge"}
    settings = Settings.from_values(
        model_mapping={"a": entry, "b": entry, "c": {"name": "acme/other"}}, preload_models="b,a"
    )
    assert settings.served_models().preload == ("a",)


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
