"""What docs/deploy.md and docs/monitoring.md say about the files in `deploy/`, the Dockerfile and the metrics."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from tests.container.dockerfile import stages
from tests.docs.markdown import ROOT, blocks, rows

if TYPE_CHECKING:
    from pathlib import Path

    from tests.service import Service

DEPLOY, MONITORING = (
    [ROOT / "docs" / f"{name}{language}.md" for language in ("", ".zh-CN")] for name in ("deploy", "monitoring")
)


def first_cells(document: Path, pattern: str) -> list[str]:
    """Return the names in code in the first column of the tables, of those rows whose first cell has the pattern."""
    cells = [row[0] for row in rows(document.read_text(encoding="utf-8")) if re.search(pattern, row[0])]
    return [name for cell in cells for name in re.findall(r"`([^`]+)`", cell)]


@pytest.mark.parametrize("document", [*DEPLOY, *MONITORING], ids=lambda path: path.name)
def test_named_files_exist(document: Path) -> None:
    """Every path below `deploy/` and `tests/`, in the text and in commands."""
    paths = set(re.findall(r"(?<![\w/])(?:deploy|tests)/[\w./-]*\w", document.read_text(encoding="utf-8")))
    assert len(paths) >= 3
    assert [path for path in paths if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("document", DEPLOY, ids=lambda path: path.name)
def test_all_examples_are_described(document: Path) -> None:
    """Each file of `deploy/` that users choose themselves is in the document."""
    text = document.read_text(encoding="utf-8")
    files = [path for folder in ("helm/examples", "kubernetes", "proxy", "systemd") for path in (ROOT / "deploy" / folder).iterdir()]  # fmt: skip
    assert len(files) >= 10
    assert [path.name for path in files if path.relative_to(ROOT).as_posix() not in text] == []


@pytest.mark.parametrize("document", DEPLOY, ids=lambda path: path.name)
def test_targets_and_arguments_are_those_of_the_dockerfile(document: Path) -> None:
    """The table has every argument, and commands use no others."""
    arguments = {
        step.text.partition("=")[0] for stage in stages().values() for step in stage.steps if step.name == "ARG"
    }
    assert set(first_cells(document, "`[A-Z_]+`$")) == arguments
    text = document.read_text(encoding="utf-8")
    assert set(re.findall(r"--build-arg (\w+)", text)) <= arguments
    assert set(re.findall(r"--target (\w+)", text)) == {"slim", "baked"} <= stages().keys()


@pytest.mark.parametrize("document", MONITORING, ids=lambda path: path.name)
def test_all_metrics_are_described(document: Path, service: Service) -> None:
    """The table has the metrics of a running service, and no others."""
    families = text_string_to_metric_families(service.http.get("/metrics").text)
    names = {family.name + ("_total" if family.type == "counter" else "") for family in families}
    described = first_cells(document, "`(emb_provider|process)_")
    assert sorted(described) == sorted(names)


@pytest.mark.parametrize("document", MONITORING, ids=lambda path: path.name)
def test_all_alerts_are_described(document: Path) -> None:
    """In the order of the file."""
    alerts = yaml.safe_load((ROOT / "deploy" / "monitoring" / "alerts.yml").read_text(encoding="utf-8"))
    names = [rule["alert"] for group in alerts["groups"] for rule in group["rules"]]
    assert first_cells(document, "`EmbProvider") == names


@pytest.mark.parametrize("document", [*DEPLOY, *MONITORING], ids=lambda path: path.name)
def test_examples_in_yaml_are_valid(document: Path) -> None:
    for block in blocks(document):
        if block.language == "yaml":
            assert yaml.safe_load(block.text)
