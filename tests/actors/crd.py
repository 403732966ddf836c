"""KubeRay's custom resources as JSON schemas that forbid what the API server would silently drop."""

import os
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

KINDS = {"RayCluster": "rayclusters.yaml", "RayJob": "rayjobs.yaml", "RayService": "rayservices.yaml"}


def closed(schema: dict[str, Any]) -> dict[str, Any]:
    """A structural schema prunes fields that it does not name, unless it says otherwise: here they are errors."""
    made = {k: v for k, v in schema.items() if k not in ("properties", "items", "additionalProperties")}
    if schema.get("x-kubernetes-int-or-string"):
        made["anyOf"] = [{"type": "integer"}, {"type": "string"}]
        return made
    if "properties" in schema:
        made["properties"] = {name: closed(one) for name, one in schema["properties"].items()}
    if "items" in schema:
        made["items"] = closed(schema["items"])
    rest = schema.get("additionalProperties")
    if isinstance(rest, dict):
        made["additionalProperties"] = closed(rest)
    elif schema.get("type") == "object" and not schema.get("x-kubernetes-preserve-unknown-fields"):
        made["additionalProperties"] = False
    return made


@cache
def _validator(kind: str) -> jsonschema.Draft202012Validator:
    folder = os.environ.get("KUBERAY_CRDS", "")
    if not folder:
        pytest.skip(f"KUBERAY_CRDS names no folder with KubeRay's schemas: {', '.join(KINDS.values())}")
    document = yaml.load((Path(folder) / KINDS[kind]).read_text(), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    version = next(v for v in document["spec"]["versions"] if v["name"] == "v1")
    schema = closed(version["schema"]["openAPIV3Schema"])
    schema["properties"]["metadata"] = {"type": "object", "required": ["name"]}  # the API server's own
    return jsonschema.Draft202012Validator(schema)


def faults(resource: dict[str, Any]) -> list[str]:
    """What KubeRay's schema says against a resource. Skips the test where there is none."""
    assert resource["apiVersion"] == "ray.io/v1"
    errors = _validator(resource["kind"]).iter_errors(resource)
    return [f"{'.'.join(map(str, error.absolute_path))}: {error.message}" for error in errors]
