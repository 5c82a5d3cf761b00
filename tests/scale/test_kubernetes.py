"""docs/cluster/kubernetes.yaml against the schemas of Kubernetes."""

import os
from pathlib import Path

import pytest
import yaml

MANIFEST = Path(__file__).parent.parent.parent / "docs" / "cluster" / "kubernetes.yaml"
VERSIONS = ("1.26", "1.30", "1.34")


@pytest.fixture(scope="module")
def schemas():
    if os.environ.get("REQUIRE_SCALE") == "1":
        import kubernetes_validate
    else:
        kubernetes_validate = pytest.importorskip("kubernetes_validate")
    return kubernetes_validate


@pytest.mark.parametrize("version", VERSIONS)
def test_the_manifest_is_what_kubernetes_expects(schemas, version):
    resources = list(yaml.safe_load_all(MANIFEST.read_text()))
    for resource in resources:
        schemas.validate(resource, version, strict=True)
    job = resources[1]
    job["spec"]["template"]["spec"]["subdomian"] = job["spec"]["template"]["spec"].pop("subdomain")
    with pytest.raises(schemas.ValidationError, match="subdomian"):
        schemas.validate(job, version, strict=True)
