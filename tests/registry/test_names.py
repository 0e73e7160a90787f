"""Which model a name means while models come and go."""

from __future__ import annotations

from emb_model_provider.model_resolver import build_alias_index
from emb_model_provider.model_spec import ModelSpec


def spec(name: str, alias: str | None = None) -> ModelSpec:
    return ModelSpec(alias=alias or name, name=name)


def test_model_that_is_added_takes_no_name_away() -> None:
    """Names mean what they meant before, unclear ones nothing; once a model is gone, its name is free for the next."""
    configured = [spec("acme/small"), spec("x/twin"), spec("y/twin")]
    added = [
        spec("acme/small", alias="small-int8"),
        spec("other/small"),
        spec("z/twin"),
        spec("p/new"),
        spec("q/new"),
    ]
    names = build_alias_index(configured, added)
    assert names["small"] == names["acme/small"] == "acme/small"
    assert "twin" not in names
    assert names["new"] == "p/new"
    assert (names["q/new"], names["small-int8"]) == ("q/new", "small-int8")
    assert build_alias_index(configured, added[4:])["new"] == "q/new"
