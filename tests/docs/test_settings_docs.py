"""The documents show the settings of the code."""

from __future__ import annotations

import importlib.util
import re
from typing import TYPE_CHECKING

import pytest

from emb_model_provider.settings import MappingEntry, Settings, allowed_values
from emb_model_provider.settings.loading import OTHER_NAMES, load_settings
from tests.docs.markdown import ROOT, rows

if TYPE_CHECKING:
    from pathlib import Path
    from types import ModuleType

COMMAND = "run `uv run python docs/render_settings.py`"
CONFIGURATIONS = ("docs/configuration.md", "docs/configuration.zh-CN.md")
MODELS = ("docs/models.md", "docs/models.zh-CN.md")
UNSET_IN_CHINESE = {"unset": "未设置", "the user's cache directory": "用户缓存目录"}


def _renderer() -> ModuleType:
    spec = importlib.util.spec_from_file_location("render_settings", ROOT / "docs" / "render_settings.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


render = _renderer()


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def test_env_example_is_up_to_date() -> None:
    """`.env.example` is the output of the generator for the current settings."""
    assert read(".env.example") == render.env_example(), COMMAND


def test_settings_table_is_up_to_date() -> None:
    """The table in docs/configuration.md is the output of the generator for the current settings."""
    document = read("docs/configuration.md")
    assert document == render.with_settings_table(document), COMMAND


def test_env_example_contains_the_defaults(tmp_path: Path) -> None:
    """With all lines uncommented, the settings are the defaults, and there are no warnings."""
    (tmp_path / ".env").write_text(re.sub(r"^#(?=EMB_PROVIDER_)", "", read(".env.example"), flags=re.MULTILINE))
    settings, warnings = load_settings(tmp_path / ".env", {})
    assert warnings == []
    assert settings == Settings()


def test_every_setting_is_in_env_example() -> None:
    """Every setting has one line in `.env.example`."""
    names = re.findall(r"^#EMB_PROVIDER_(\w+)=", read(".env.example"), re.MULTILINE)
    assert sorted(names) == sorted(name.upper() for name in Settings.variables())


def test_chinese_settings_table_has_every_setting() -> None:
    """The Chinese table has the variables in the order of the code, with their allowed values and defaults."""
    table = [row for row in rows(read("docs/configuration.zh-CN.md")) if len(row) == 4 and "`EMB_" in row[0]]
    expected = [item for group in render.settings_in_groups().values() for item in group.items()]
    assert [row[0] for row in table] == [f"`{variable}`" for variable, _ in expected]
    for (_, allowed, default, _), (variable, info) in zip(table, expected, strict=True):
        assert literals(allowed) == literals(render.shown_allowed(info)), variable
        shown = render.shown_default(info)
        assert default == UNSET_IN_CHINESE.get(shown, shown), variable


def literals(text: str) -> list[str]:
    """Return the parts of a description that are not translated: numbers, names of settings, choices."""
    choices = re.fullmatch(r"\w+(:\w+)?(, \w+(:\w+)?)+", text, re.ASCII)
    return [text] if choices else re.findall(r"\d+|[A-Z]+(?:_[A-Z]+)+|\{.*\}|\bnone\b", text, re.ASCII)


@pytest.mark.parametrize("document", MODELS)
def test_mapping_keys_table_has_every_key(document: str) -> None:
    """The table has the keys in the order of the code, each with all allowed values."""
    _, _, table = read(document).partition("<!-- mapping keys -->\n")
    found = {row[0].strip("`"): row[1] for row in rows(table.partition("\n\n")[0]) if row[0].startswith("`")}
    assert list(found) == list(MappingEntry.model_fields)
    for key, values in found.items():
        assert literals(values) == literals(allowed_values(MappingEntry.model_fields[key])), key


@pytest.mark.parametrize("document", CONFIGURATIONS)
def test_variables_of_other_tools_are_listed(document: str) -> None:
    """The table lists the variables that are read if a setting is unset, in their order."""
    table = [row for row in rows(read(document)) if len(row) == 2 and row[0].startswith("`EMB_")]
    found = {
        row[0].strip("`").removeprefix("EMB_PROVIDER_"): tuple(re.findall(r"`([A-Z_]+)`", row[1])) for row in table
    }
    assert {name: found.get(name) for name in OTHER_NAMES} == dict(OTHER_NAMES)
