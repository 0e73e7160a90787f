"""The Helm chart: linted, rendered with many values, and validated against the schemas of Kubernetes and of the operators."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from emb_model_provider.settings import Settings
from emb_model_provider.settings.loading import load_settings

if TYPE_CHECKING:
    from tests.clients.isolated import Environment

pytestmark = pytest.mark.slow

DEPLOY = Path(__file__).parents[2] / "deploy"
CHART = DEPLOY / "helm" / "emb-model-provider"
EXAMPLES = sorted((DEPLOY / "helm" / "examples").glob("*.yaml"))
KUBERNETES = "1.34"
NODE = Path(__file__).with_name("node")
CUSTOM = {"HTTPRoute", "PrometheusRule", "ScaledObject", "ServiceMonitor"}
MONITORED = {"monitoring": {name: {"enabled": True} for name in ("serviceMonitor", "rules", "dashboard")}}
CHOICES: list[list[dict[str, Any]]] = [
    [{}, {"openshift": True, "serviceAccount": {"create": False}}],
    [{}, {"autoscaling": {"kind": "hpa"}}, {"autoscaling": {"kind": "keda"}, "fullnameOverride": "e" * 70}],
    [
        {"existingSecret": "keys", "replicaCount": 2},
        {"persistence": {"enabled": True, "accessModes": ["ReadWriteMany"], "storageClass": "nfs"}},
        {"persistence": {"enabled": True, "existingClaim": "models"}, "podAnnotations": {"a": "b"}},
    ],
    [
        {"model": {"name": "BAAI/bge-m3", "precision": "int8"}, "service": {"type": "LoadBalancer"}},
        {
            "pull": {"enabled": False},
            "model": {"mapping": {"a": {"name": "x/y", "prompts": {"query": 'say "it": '}}}},
            "settings": {"MAX_BATCH_SIZE": 32, "OFFLINE": True, "QUOTAS": {"key-1": 5}, "API_KEYS": "k", "HF_ENDPOINT": "https://hub.example.com"},
            "extraEnv": [{"name": "OTEL_SERVICE_NAME", "value": "x"}],
        },
    ],
    [
        {"podDisruptionBudget": {"enabled": False}},
        {**MONITORED, "networkPolicy": {"enabled": True}},
        {"networkPolicy": {"enabled": True, "hubs": False, "from": [{"namespaceSelector": {}}]}, "nodeSelector": {"a": "b"}, "tolerations": [{"operator": "Exists"}], "priorityClassName": "high", "podLabels": {"team": "search"}},
    ],
]  # fmt: skip
MATRIX = [{key: value for part in parts for key, value in part.items()} for parts in itertools.product(*CHOICES)]
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"replicas": 2}, "replicas"),
    ({"model": {"source": "somewhere"}}, "source"),
    ({"settings": {"PORT": 8000}}, "PORT"),
    ({"settings": {"max_batch_size": 3}}, "max_batch_size"),
    ({"autoscaling": {"kind": "cron"}}, "kind"),
    ({"persistence": {"enabled": True}, "replicaCount": 2}, "persistence.accessModes to [ReadWriteMany]"),
    ({"persistence": {"enabled": True}, "autoscaling": {"kind": "keda"}}, "ReadWriteMany"),
]


@pytest.fixture(scope="module")
def rendered(tools: Environment) -> dict[str, Any]:
    """Render all values at once, because loading the library takes seconds."""
    examples = [yaml.safe_load(path.read_text(encoding="utf-8")) for path in EXAMPLES]
    cases = [*MATRIX, *examples, *(values for values, _ in WRONG)]
    return tools.run("chart", chart=str(CHART), version=KUBERNETES, cases=cases)


@pytest.fixture(scope="module")
def matrix(rendered: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the results of the values that are valid, the examples last."""
    found: list[dict[str, Any]] = rendered["results"][: len(MATRIX) + len(EXAMPLES)]
    return found


@pytest.fixture(scope="module")
def examples(matrix: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {path.stem: result for path, result in zip(EXAMPLES, matrix[len(MATRIX) :], strict=True)}


def of_kind(result: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    return [each for each in result["objects"] if each["kind"] == kind]


def pod_of(result: dict[str, Any]) -> dict[str, Any]:
    (deployment,) = of_kind(result, "Deployment")
    spec: dict[str, Any] = deployment["spec"]["template"]["spec"]
    return spec


def containers(result: dict[str, Any]) -> list[dict[str, Any]]:
    pod = pod_of(result)
    return [*pod.get("initContainers", ()), *pod["containers"]]


def test_chart_is_linted_without_findings(rendered: dict[str, Any]) -> None:
    """Strictly, so that warnings are errors. An icon is not necessary."""
    messages = [message["error"] for message in rendered["lint"]["messages"]]
    assert messages == ["icon is recommended"]
    assert rendered["lint"]["errors"] == []


def test_all_objects_are_valid(matrix: list[dict[str, Any]]) -> None:
    """With every combination of values, strictly: unknown fields are errors, too."""
    assert len(matrix) >= 100
    assert [(result["error"], result["invalid"]) for result in matrix] == [("", [])] * len(matrix)
    kinds = {each["kind"] for result in matrix for each in result["objects"]}
    assert kinds == {
        "ConfigMap", "Deployment", "HorizontalPodAutoscaler", "NetworkPolicy", "PersistentVolumeClaim", "PodDisruptionBudget",
        "PrometheusRule", "ScaledObject", "Service", "ServiceAccount", "ServiceMonitor",
    }  # fmt: skip


def test_custom_resources_are_valid(matrix: list[dict[str, Any]], pytestconfig: pytest.Config) -> None:
    """Those of the chart and of the example for gateways, against the schemas of their definitions."""
    if shutil.which("npm") is None:
        pytest.skip("npm not found: install Node.js 18 or later to validate custom resources")
    assert pytestconfig.cache is not None
    directory = pytestconfig.cache.mkdir("deploy-node-packages")
    shutil.copytree(NODE, directory, dirs_exist_ok=True)
    command = ["npm", "install", "--ignore-scripts", "--no-audit", "--no-fund", "--no-package-lock"]
    subprocess.run(command, cwd=directory, check=True, stdin=subprocess.DEVNULL, timeout=500)
    pool = yaml.safe_load_all((DEPLOY / "kubernetes" / "inferencepool.yaml").read_text(encoding="utf-8"))
    objects = [*pool, *(each for result in matrix for each in result["objects"])]
    custom = [each for each in objects if each["kind"] in CUSTOM]
    assert {each["kind"] for each in custom} == CUSTOM

    def errors(given: list[dict[str, Any]]) -> list[str]:
        done = subprocess.run(["node", "validate.mjs"], cwd=directory, input=json.dumps(given), capture_output=True, text=True, check=True)  # fmt: skip
        found: list[str] = json.loads(done.stdout)
        return found

    assert errors(custom) == []
    assert len(errors([{**each, "spec": {}} for each in custom if each["kind"] == "ScaledObject"][:1])) == 1


@pytest.mark.parametrize("number", range(len(WRONG)), ids=lambda number: WRONG[number][1])
def test_wrong_values_are_rejected(rendered: dict[str, Any], number: int) -> None:
    """The message names the value."""
    assert WRONG[number][1] in rendered["results"][len(MATRIX) + len(EXAMPLES) + number]["error"]


def test_containers_have_no_privileges(matrix: list[dict[str, Any]]) -> None:
    """As the restricted profile of Kubernetes demands. OpenShift chooses the user, and the chart does otherwise."""
    for values, result in itertools.zip_longest(MATRIX, matrix, fillvalue={}):
        pod = pod_of(result)
        assert pod["enableServiceLinks"] is False
        assert pod["automountServiceAccountToken"] is False
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        if values:
            assert ("runAsUser" in pod["securityContext"]) is not values.get("openshift", False)
            assert ("fsGroup" in pod["securityContext"]) is not values.get("openshift", False)
        for container in containers(result):
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            assert {mount["mountPath"] for mount in container["volumeMounts"]} == {"/data", "/tmp"}  # noqa: S108 - in the container


def test_replicas_are_replaced_without_lost_requests(matrix: list[dict[str, Any]]) -> None:
    """A new replica is ready before an old one stops, which has time for its requests."""
    for result in matrix:
        (deployment,) = of_kind(result, "Deployment")
        assert deployment["spec"]["strategy"]["rollingUpdate"]["maxUnavailable"] == 0
        pod = pod_of(result)
        (container,) = pod["containers"]
        assert (
            container["startupProbe"]["httpGet"]["path"] == container["readinessProbe"]["httpGet"]["path"] == "/ready"
        )
        assert container["livenessProbe"]["httpGet"]["path"] == "/health"
        wait_s = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
        grace_s = float(variables(container)["EMB_PROVIDER_SHUTDOWN_GRACE_S"])
        assert pod["terminationGracePeriodSeconds"] > wait_s + grace_s
        assert grace_s >= Settings().limits.request_timeout_s


def variables(container: dict[str, Any]) -> dict[str, str]:
    return {each["name"]: each["value"] for each in container["env"]}


def test_environment_is_read_without_warnings(matrix: list[dict[str, Any]]) -> None:
    """Values become the settings that they are named after, whatever their type."""
    for result in matrix:
        for container in containers(result):
            settings, warnings = load_settings(Path("/no/such/file"), variables(container))
            assert warnings == []
            if "EMB_PROVIDER_QUOTAS" in variables(container):
                assert settings.server.quotas == {"key-1": 5}
                assert settings.batching.max_batch_size == 32
                assert settings.hubs.offline
                assert settings.models.model_mapping["a"].prompts == {"query": 'say "it": '}


def test_models_are_pulled_before_the_start(matrix: list[dict[str, Any]]) -> None:
    """With the same image, variables, secret and directory as the service, unless the image contains them."""
    for values, result in zip(MATRIX, matrix, strict=False):
        pod = pod_of(result)
        pulls = pod.get("initContainers", [])
        assert bool(pulls) is values.get("pull", {}).get("enabled", True)
        for pull in pulls:
            assert pull["args"] == ["pull", "--progress", "plain"]
            for name in ("image", "env", "envFrom", "volumeMounts"):
                assert pull.get(name) == pod["containers"][0].get(name)


def test_number_of_replicas_follows_the_tokens_in_the_queue(matrix: list[dict[str, Any]]) -> None:
    """The autoscaler names the Deployment, which leaves the number to it."""
    for values, result in zip(MATRIX, matrix, strict=False):
        (deployment,) = of_kind(result, "Deployment")
        kind = values.get("autoscaling", {}).get("kind", "none")
        assert ("replicas" in deployment["spec"]) is (kind == "none")
        scalers = [*of_kind(result, "HorizontalPodAutoscaler"), *of_kind(result, "ScaledObject")]
        assert [each["spec"]["scaleTargetRef"]["name"] for each in scalers] == [deployment["metadata"]["name"]] * (
            kind != "none"
        )
        for each in of_kind(result, "ScaledObject"):
            (service,) = of_kind(result, "Service")
            query = each["spec"]["triggers"][0]["metadata"]["query"]
            assert (
                query
                == f'sum(emb_provider_queue_tokens{{namespace="embeddings",service="{service["metadata"]["name"]}"}})'
            )
            assert len(service["metadata"]["name"]) <= 63


def test_selectors_find_the_pods_and_the_service(matrix: list[dict[str, Any]]) -> None:
    """Services, budgets, policies and monitors select by labels that the pods and the service have."""
    for result in matrix:
        (deployment,) = of_kind(result, "Deployment")
        (service,) = of_kind(result, "Service")
        labels = deployment["spec"]["template"]["metadata"]["labels"].items()
        assert deployment["spec"]["selector"]["matchLabels"].items() <= labels
        assert service["spec"]["selector"].items() <= labels
        for kind, name in (("PodDisruptionBudget", "selector"), ("NetworkPolicy", "podSelector")):
            for each in of_kind(result, kind):
                assert each["spec"][name]["matchLabels"].items() <= labels
        for monitor in of_kind(result, "ServiceMonitor"):
            assert monitor["spec"]["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
            assert monitor["spec"]["endpoints"][0]["port"] == service["spec"]["ports"][0]["name"]
            # The job that the alert rules select.
            assert service["metadata"]["labels"][monitor["spec"]["jobLabel"]] == "emb-model-provider"


def test_rules_and_dashboard_are_those_of_the_repository(matrix: list[dict[str, Any]]) -> None:
    """Unchanged, although both contain the delimiters of Helm's templates."""
    rules = yaml.safe_load((DEPLOY / "monitoring" / "alerts.yml").read_text(encoding="utf-8"))
    dashboard = json.loads((DEPLOY / "monitoring" / "dashboard.json").read_text(encoding="utf-8"))
    found = [result for result in matrix if of_kind(result, "PrometheusRule")]
    assert found
    for result in found:
        assert of_kind(result, "PrometheusRule")[0]["spec"] == rules
        assert [json.loads(each["data"]["emb-model-provider.json"]) for each in of_kind(result, "ConfigMap")] == [
            dashboard
        ]


def test_closed_network_policy_allows_no_egress(examples: dict[str, dict[str, Any]]) -> None:
    """An image that contains its model needs no network."""
    (policy,) = of_kind(examples["model-in-image"], "NetworkPolicy")
    assert policy["spec"]["egress"] == []
    assert "initContainers" not in pod_of(examples["model-in-image"])


def test_notes_warn_if_no_key_is_required(examples: dict[str, dict[str, Any]]) -> None:
    assert "Any pod that can reach the service can use it" not in examples["one-model"]["notes"]
    assert "Any pod that can reach the service can use it" in examples["gpu"]["notes"]


def test_versions_are_those_of_the_project() -> None:
    """The chart, the image and the package have one version."""
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text(encoding="utf-8"))
    project = (DEPLOY.parent / "pyproject.toml").read_text(encoding="utf-8")
    assert f'version = "{chart["version"]}"' in project
    assert chart["appVersion"] == chart["version"]


def test_examples_for_gateways_and_kserve_fit_the_service() -> None:
    """The pool selects the pods of the chart, and both use the port of the service."""
    pool, route = yaml.safe_load_all((DEPLOY / "kubernetes" / "inferencepool.yaml").read_text(encoding="utf-8"))
    assert pool["spec"]["selector"]["matchLabels"] == {"app.kubernetes.io/name": "emb-model-provider"}
    assert pool["spec"]["targetPorts"] == [{"number": Settings().server.port}]
    assert set(pool["spec"]["endpointPickerRef"]) == {"name", "port"}
    assert route["spec"]["rules"][0]["backendRefs"][0]["name"] == pool["metadata"]["name"]
    kserve = yaml.safe_load((DEPLOY / "kubernetes" / "kserve.yaml").read_text(encoding="utf-8"))
    predictor = kserve["spec"]["predictor"]
    (container,) = predictor["containers"]
    assert container["ports"][0]["containerPort"] == Settings().server.port
    assert predictor["enableServiceLinks"] is False
    assert predictor["terminationGracePeriodSeconds"] > Settings().lifecycle.shutdown_grace_s
    assert re.fullmatch(r"serving\.kserve\.io/v1\w*", kserve["apiVersion"])
