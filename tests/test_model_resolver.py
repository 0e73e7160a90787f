"""Names of models while models are added and removed. See tests/management for names of models on disk."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import pytest

from emb_model_provider.errors import SettingsError
from emb_model_provider.model_resolver import NameIndex, ResolvedName, resolve_model
from emb_model_provider.model_spec import (
    ModelSpec,
    RepositoryAddress,
    RequestDefaults,
    name_of_directory,
    parse_address,
)
from emb_model_provider.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path


FOR_QUERIES = RequestDefaults(input_type="query")


def spec(name: str, alias: str | None = None, **more_aliases: str | None) -> ModelSpec:
    more = {each: RequestDefaults(input_type=input_type) for each, input_type in more_aliases.items()}
    return ModelSpec(alias=alias or name, name=name, more_aliases=more)


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
    assert names.find_similar("e5-query") == ResolvedName("acme/e5", "acme/e5", FOR_QUERIES, needs_prompts=True)
    assert names.find_similar("acme/E5-Passage") == ResolvedName(
        "acme/e5", "acme/e5", RequestDefaults(input_type="document"), needs_prompts=True
    )
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
    assert names.find("bge-query") == ResolvedName("bge", "bge-query", FOR_QUERIES)
    assert names.find("m3") == ResolvedName("bge", "m3")
    assert names.find("acme/bge") == ResolvedName("bge", "bge")
    assert resolve_model(settings, "bge-query") == one
    assert resolve_model(settings, "acme/bge", alias="m3") == one
    renamed = resolve_model(settings, "acme/bge", alias="new")
    assert (renamed.aliases, renamed.defaults) == (("new",), RequestDefaults())


def test_aliases_of_a_reranker_share_the_model() -> None:
    """They may differ in the form of the scores, and in what happens to long documents. The id has the first one's."""
    settings = Settings.from_values(
        model_mapping={
            "rerank": {"name": "acme/rerank", "raw_scores": True},
            "rerank-01": {"name": "acme/rerank"},
            "rerank-cut": {"name": "acme/rerank", "long_documents": "cut", "aliases": ["cut"]},
        }
    )
    (one,) = settings.models.specs()
    names = NameIndex([one])
    defaults = {
        "rerank": RequestDefaults(raw_scores=True),
        "rerank-01": RequestDefaults(),
        "rerank-cut": RequestDefaults(long_documents="cut"),
        "cut": RequestDefaults(long_documents="cut"),
    }
    assert {alias: one.defaults_of(alias) for alias in one.aliases} == defaults
    for name, expected in {**defaults, "acme/rerank": RequestDefaults(raw_scores=True)}.items():
        found = names.find(name)
        assert found is not None
        assert (found.alias, found.defaults) == ("rerank", expected)


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


# --- URLs of hubs -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "source", "name", "revision"),
    [
        ("https://huggingface.co/BAAI/bge-m3", "huggingface", "BAAI/bge-m3", None),
        ("hf.co/BAAI/bge-m3", "huggingface", "BAAI/bge-m3", None),
        ("http://www.huggingface.co/BAAI/bge-m3/", "huggingface", "BAAI/bge-m3", None),
        ("https://hf-mirror.com/BAAI/bge-m3?library=transformers#usage", "huggingface", "BAAI/bge-m3", None),
        ("https://huggingface.co/BAAI/bge-m3/tree/main", "huggingface", "BAAI/bge-m3", None),
        ("https://huggingface.co/BAAI/bge-m3/tree/v2/onnx", "huggingface", "BAAI/bge-m3", "v2"),
        (
            "https://huggingface.co/BAAI/bge-m3/blob/refs%2Fpr%2F9/config.json",
            "huggingface",
            "BAAI/bge-m3",
            "refs/pr/9",
        ),
        ("https://huggingface.co/BAAI/bge-m3@v2", "huggingface", "BAAI/bge-m3", "v2"),
        ("https://huggingface.co/bert-base-uncased/tree/main", "huggingface", "bert-base-uncased", None),
        ("git@hf.co:BAAI/bge-m3", "huggingface", "BAAI/bge-m3", None),
        ("https://www.modelscope.cn/models/iic/gte", "modelscope", "iic/gte", None),
        ("modelscope.cn/models/iic/gte", "modelscope", "iic/gte", None),
        ("www.modelscope.cn/models/iic/gte/summary", "modelscope", "iic/gte", None),
        ("https://modelscope.cn/models/iic/gte/files", "modelscope", "iic/gte", None),
        ("https://modelscope.cn/models/iic/gte/tree/master", "modelscope", "iic/gte", None),
        ("https://modelscope.cn/models/iic/gte/tree/v1.0.1/config.json", "modelscope", "iic/gte", "v1.0.1"),
        ("https://modelscope.cn/models/iic/gte/summary?version=v2", "modelscope", "iic/gte", "v2"),
        ("https://www.modelscope.cn/iic/gte.git", "modelscope", "iic/gte", None),
        ("HTTPS://ModelScope.ai/models/iic/gte", "modelscope", "iic/gte", None),
    ],
)
def test_urls_of_hubs(text: str, source: Literal["huggingface", "modelscope"], name: str, revision: str | None) -> None:
    """As copied from the address bar, or from the buttons for copying."""
    assert parse_address(text) == RepositoryAddress(source, name, revision)
    resolved = resolve_model(Settings(), text)
    assert (resolved.alias, resolved.name, resolved.source, resolved.revision) == (name, name, source, revision)


@pytest.mark.parametrize(
    "text", ["BAAI/bge-m3", "bge-m3", "./hf.co/a", "D:\\models\\x", "a/b@v1", "[::", "models/hf.co"]
)
def test_names_that_are_no_urls(text: str) -> None:
    assert parse_address(text) is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("https://huggingface.co/datasets/a/b", "not the page of a model"),
        ("https://modelscope.cn/datasets/a/b", "not the page of a model"),
        ("huggingface.co", "not the page of a model"),
        ("https://example.com/a/b", "not the URL of a model on huggingface.co, "),
        ("ftp://hf.co/a/b", "not the URL of a model on huggingface.co, "),
    ],
)
def test_other_urls_are_rejected(text: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        resolve_model(Settings(), text)


def test_url_must_not_contradict_source_and_revision() -> None:
    url = "https://huggingface.co/a/b/tree/v1"
    assert resolve_model(Settings(), url, source="huggingface", revision="v1").revision == "v1"
    with pytest.raises(SettingsError, match="is on huggingface, not on modelscope"):
        resolve_model(Settings(), url, source="modelscope")
    with pytest.raises(SettingsError, match="names the revision v1, not v2"):
        resolve_model(Settings(), url, revision="v2")


def test_url_of_a_configured_model() -> None:
    """It has the other settings of the model."""
    settings = mapped({"m": {"name": "a/b", "source": "modelscope", "precision": "int8"}})
    assert resolve_model(settings, "https://modelscope.cn/models/a/b").precision == "int8"
    assert resolve_model(settings, "https://huggingface.co/a/b").precision == "auto"


def test_last_part_of_a_configured_name() -> None:
    """If only one configured model has it. Other names without an owner are ids of Hugging Face."""
    settings = mapped(
        {"x": {"name": "a/small", "source": "modelscope"}, "y": {"name": "b/twin"}, "z": {"name": "c/twin"}}
    )
    assert resolve_model(settings, "small").alias == "x"
    assert resolve_model(settings, "twin").name == "twin"
    assert resolve_model(Settings(), "all-MiniLM-L6-v2").source == "bundled"
