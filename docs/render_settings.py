"""Write `.env.example` and the table in `docs/configuration.md` from the settings themselves.

    uv run python docs/render_settings.py

`tests/docs/test_settings_docs.py` fails until this was run after a change of `emb_model_provider/settings/groups.py`.
"""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic_core import PydanticUndefined

from emb_model_provider.settings import PREFIX, Settings, allowed_values

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

REPOSITORY = Path(__file__).parent.parent
ENV_EXAMPLE = REPOSITORY / ".env.example"
CONFIGURATION = REPOSITORY / "docs" / "configuration.md"
BEGIN, END = "<!-- settings: begin (docs/render_settings.py writes this part) -->", "<!-- settings: end -->"
USER_CACHE = "the user's cache directory"
UNSET = "unset"

_WIDTH = 100
_HEAD = """\
# Every setting of emb-model-provider, with its default. Copy to `.env` in the directory the service is started
# in, and take the # off the lines you change. A variable of the process wins over this file; an empty value
# means unset. Written by docs/render_settings.py: change emb_model_provider/settings/groups.py instead.
"""


def settings_in_groups() -> dict[str, dict[str, FieldInfo]]:
    """Return all settings as title → variable → field, in the order of the code."""
    return {
        group.title: {PREFIX + name.upper(): info for name, info in group.model_fields.items()}
        for group in Settings.groups().values()
    }


def env_value(info: FieldInfo) -> str:
    """Return a default as it is written in `.env`; empty where it is unset, or found out at the start."""
    default = info.default
    if default is None or default == () or default is PydanticUndefined:
        return ""
    if isinstance(default, bool):
        return str(default).lower()
    if isinstance(default, dict):
        return json.dumps(default)
    return str(default)


def shown_default(info: FieldInfo) -> str:
    """Return a default for a reader."""
    if info.default_factory is not None:
        return USER_CACHE
    value = env_value(info)
    return f"`{value}`" if value else UNSET


def shown_allowed(info: FieldInfo) -> str:
    return allowed_values(info) or "text"


def env_example() -> str:
    parts = [_HEAD]
    for title, settings in settings_in_groups().items():
        parts.append(f"\n# --- {title} {'-' * (_WIDTH - len(title) - 7)}\n")
        for variable, info in settings.items():
            allowed = shown_allowed(info)
            text = f"{info.description} Allowed: {allowed}."
            parts.append("\n" + textwrap.fill(text, _WIDTH, initial_indent="# ", subsequent_indent="# ",
                                              break_long_words=False, break_on_hyphens=False))  # fmt: skip
            parts.append(f"\n#{variable}={env_value(info)}\n")
    return "".join(parts)


def settings_table() -> str:
    lines = []
    for title, settings in settings_in_groups().items():
        lines += [f"### {title}", "", "| variable | allowed | default | meaning |", "|---|---|---|---|"]
        for variable, info in settings.items():
            cells = (f"`{variable}`", shown_allowed(info), shown_default(info), info.description or "")
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        lines.append("")
    return "\n".join(lines)


def with_settings_table(document: str) -> str:
    """Return a document whose part between the markers is the table."""
    before, begin, rest = document.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{CONFIGURATION} lacks the markers {BEGIN!r} and {END!r}.")
    return f"{before}{BEGIN}\n\n{settings_table()}\n{END}{after}"


def main() -> None:
    ENV_EXAMPLE.write_text(env_example(), encoding="utf-8")
    CONFIGURATION.write_text(with_settings_table(CONFIGURATION.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
