"""The alert rules, the dashboard, and the configuration of Prometheus and Grafana."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from tests.service import BUNDLED

if TYPE_CHECKING:
    from tests.clients.isolated import Environment
    from tests.service import Service

DEPLOY = Path(__file__).parents[2] / "deploy"
DASHBOARD = json.loads((DEPLOY / "monitoring" / "dashboard.json").read_text(encoding="utf-8"))
JOB = "emb-model-provider"
METRIC = re.compile(r"\b(?:emb_provider|process)_\w+")
SELECTOR = re.compile(r"\b((?:emb_provider|process)_\w+)\{([^}]*)\}")
SUFFIXES = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count"), "gauge": ("",)}


def read(path: str) -> Any:
    return yaml.safe_load((DEPLOY / path).read_text(encoding="utf-8"))


def rules() -> list[dict[str, Any]]:
    return [rule for group in read("monitoring/alerts.yml")["groups"] for rule in group["rules"]]


def panels() -> list[dict[str, Any]]:
    return [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]


def expressions() -> dict[str, str]:
    """Return all expressions by the alert, the panel or the variable that they belong to, and files with some."""
    found = {rule["alert"]: rule["expr"] for rule in rules()}
    for panel in panels():
        found |= {f"{panel['title']} {target['refId']}": target["expr"] for target in panel["targets"]}
    for variable in DASHBOARD["templating"]["list"]:
        if variable["type"] == "query":
            found[variable["name"]] = variable["query"]["query"]
    for path in sorted([*DEPLOY.glob("helm/*/templates/*.yaml"), *DEPLOY.glob("kubernetes/*.yaml")]):
        if METRIC.search(text := path.read_text(encoding="utf-8")):
            found[path.name] = text
    return found


@pytest.fixture(scope="module")
def live(service: Service) -> dict[str, set[str]]:
    """Return the names of all series of a service that has answered requests, with the names of their labels."""
    service.embed("a text", "another")
    service.embed("x", dimensions=5)
    found: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(service.http.get("/metrics").text):
        for suffix in SUFFIXES.get(family.type, ("",)):
            found[family.name + suffix] = set()
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    assert BUNDLED in service.http.get("/metrics").text
    return found


def test_expressions_are_found() -> None:
    """The tests below check something."""
    assert len(rules()) >= 10
    assert len(panels()) >= 20
    assert len({name for text in expressions().values() for name in METRIC.findall(text)}) >= 30


@pytest.mark.parametrize("name", expressions())
def test_metrics_of_alerts_and_panels_exist(name: str, live: dict[str, set[str]]) -> None:
    """Each name is one of a live `/metrics`, and each label that is selected is one of its labels."""
    text = expressions()[name]
    missing = set(METRIC.findall(text)) - live.keys()
    assert missing == set()
    for metric, selector in SELECTOR.findall(text):
        labels = set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", selector)) - {"job", "instance", "namespace", "service"}
        if live[metric]:
            assert labels <= live[metric], metric


def test_all_metrics_of_the_service_are_on_the_dashboard(live: dict[str, set[str]]) -> None:
    """A metric that is added is also shown, or is left out here."""
    shown = {metric for panel in panels() for target in panel["targets"] for metric in METRIC.findall(target["expr"])}
    own = {re.sub(r"_(bucket|sum|count)$", "", name) for name in live if name.startswith("emb_provider_")}
    assert own - {re.sub(r"_(bucket|sum|count)$", "", name) for name in shown} == {"emb_provider_key_requests_total", "emb_provider_queue_inputs"}  # fmt: skip


@pytest.mark.slow
def test_expressions_are_valid(tools: Environment) -> None:
    """A parser of PromQL accepts them. Grafana replaces its variables before."""
    texts = [
        text.replace("$__rate_interval", "5m")
        for name, text in expressions().items()
        if not text.startswith("label_values") and not name.endswith(".yaml")
    ]
    assert tools.run("promql", expressions=texts) == {}
    assert tools.run("promql", expressions=["rate(emb_provider_tokens_total[5m]"]) != {}


def test_alerts_say_what_happened() -> None:
    """Each has a severity, a summary with the labels that its expression keeps, and a description."""
    names = [rule["alert"] for rule in rules()]
    assert len(names) == len(set(names))
    for rule in rules():
        assert rule["labels"]["severity"] in {"warning", "critical"}
        assert set(rule["annotations"]) == {"summary", "description"}
        kept = re.search(r"by \(([^)]*)\)", rule["expr"])
        for label in re.findall(r"\$labels\.(\w+)", rule["annotations"]["summary"]):
            assert kept is None or label in kept[1].split(", "), rule["alert"]


def test_panels_do_not_overlap() -> None:
    """Each place of the grid belongs to one panel, and each panel has its own id."""
    places = [
        (position["x"] + column, position["y"] + line)
        for position in (panel["gridPos"] for panel in DASHBOARD["panels"])
        for column in range(position["w"])
        for line in range(position["h"])
    ]
    assert len(places) == len(set(places))
    assert max(column for column, _ in places) < 24
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(ids) == len(set(ids))


def test_prometheus_scrapes_the_service_under_the_name_in_the_rules() -> None:
    """The rules select this job, and Prometheus reads them from where compose mounts them."""
    prometheus, services = read("compose/prometheus.yml"), read("compose/docker-compose.yml")["services"]
    (job,) = prometheus["scrape_configs"]
    assert job["job_name"] == JOB
    assert {name for rule in rules() for name in re.findall(r'job="([^"]+)"', rule["expr"])} == {JOB}
    assert job["static_configs"] == [{"targets": [f"{JOB}:9000"]}]
    assert JOB in services
    mounted = [volume.split(":")[1] for volume in services["prometheus"]["volumes"]]
    assert set(prometheus["rule_files"]) <= set(mounted)


def test_grafana_finds_prometheus_and_the_dashboard() -> None:
    """The provisioned source is the service of compose, and the dashboard is in the provisioned directory."""
    services = read("compose/docker-compose.yml")["services"]
    (source,) = read("compose/grafana/datasources.yml")["datasources"]
    assert source["url"] == "http://prometheus:9090"
    assert source["type"] == DASHBOARD["templating"]["list"][0]["query"] == "prometheus"
    (provider,) = read("compose/grafana/dashboards.yml")["providers"]
    (mount,) = (volume for volume in services["grafana"]["volumes"] if "dashboard.json" in volume)
    assert Path(mount.split(":")[1]).parent == Path(provider["options"]["path"])
