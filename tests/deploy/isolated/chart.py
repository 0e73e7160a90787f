"""Renders a chart with each of several values, and checks the objects against the schemas of Kubernetes."""

from __future__ import annotations

import json
import sys

import kubernetes_validate
import yaml
from helm_python import Chart, HelmError, lint

arguments = json.load(sys.stdin)
path, version = arguments["chart"], arguments["version"]
results = []
with Chart.load(path) as chart:
    for values in arguments["cases"]:
        result = {"objects": [], "notes": "", "invalid": [], "error": ""}
        results.append(result)
        try:
            chart.validate_schema(values)
            rendered = chart.render(values, name="release", namespace="embeddings", is_install=True)
        except HelmError as error:
            result["error"] = str(error)
            continue
        for name, text in rendered.items():
            if name.endswith("NOTES.txt"):
                result["notes"] = text
                continue
            for each in yaml.safe_load_all(text):
                if each is not None:
                    result["objects"].append(each)
                    try:
                        kubernetes_validate.validate(each, version, strict=True)
                    except kubernetes_validate.SchemaNotFoundError:
                        pass  # a custom resource
                    except kubernetes_validate.ValidationError as error:
                        result["invalid"].append(f"{name}: {error}")
print(json.dumps({"results": results, "lint": lint(path, strict=True)}))  # noqa: T201 - the result
