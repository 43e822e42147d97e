"""The files in deploy/: what no engine here can check."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.servers import ROOT

DEPLOY = ROOT / "deploy"
MANIFESTS = sorted((DEPLOY / "kubernetes").glob("*.yaml"))
COMPOSED = sorted(DEPLOY.glob("*/compose.yaml"))
DOCKERFILE = (ROOT / "Dockerfile").read_text()


def objects(manifest: Path) -> dict[str, dict[str, Any]]:
    return {each["kind"]: each for each in yaml.safe_load_all(manifest.read_text())}


def of_tokenauth(file: Path) -> Iterator[dict[str, Any]]:
    services = yaml.safe_load(file.read_text())["services"]
    yield from (each for each in services.values() if each["image"] == "tokenauth" and "healthcheck" in each)


def test_there_are_three_cases_and_two_manifests() -> None:
    assert [file.parent.name for file in COMPOSED] == ["alone", "forward-auth", "two-nodes"]
    assert [file.name for file in MANIFESTS] == ["postgres.yaml", "sqlite.yaml"]


@pytest.mark.parametrize("file", COMPOSED, ids=lambda file: file.parent.name)
def test_composed_servers_run_without_rights(file: Path) -> None:
    servers = list(of_tokenauth(file))
    assert servers
    for server in servers:
        assert server["read_only"] is True
        assert server["cap_drop"] == ["ALL"]
        assert server["security_opt"] == ["no-new-privileges:true"]
        assert "user" not in server
        assert "ports" not in server or all(port.startswith("127.0.0.1:") for port in server["ports"])


@pytest.mark.parametrize("file", MANIFESTS, ids=lambda file: file.stem)
def test_pods_run_without_rights(file: Path) -> None:
    pod = objects(file)["Deployment"]["spec"]["template"]["spec"]
    user = int(re.findall(r"^USER (\d+):\d+$", DOCKERFILE, re.MULTILINE)[0])
    rights = pod["securityContext"]
    assert (rights["runAsNonRoot"], rights["runAsUser"], rights["fsGroup"]) == (True, user, user)
    assert pod["automountServiceAccountToken"] is False
    (container,) = pod["containers"]
    limits = container["securityContext"]
    assert (limits["readOnlyRootFilesystem"], limits["allowPrivilegeEscalation"]) == (True, False)
    assert limits["capabilities"]["drop"] == ["ALL"]
    mounted = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert {volume["name"] for volume in pod["volumes"]} == set(mounted)
    assert {"/data", "/tmp", "/etc/tokenauth"} == set(mounted.values())  # noqa: S108 - the mount of a volume


@pytest.mark.parametrize("file", MANIFESTS, ids=lambda file: file.stem)
def test_secrets_of_pods_are_mounted_files(file: Path) -> None:
    found = objects(file)
    assert "Secret" not in found  # it would be in a repository
    (container,) = found["Deployment"]["spec"]["template"]["spec"]["containers"]
    for variable in container["env"]:
        assert variable["value"].startswith("/etc/tokenauth/")
    names = {variable["name"] for variable in container["env"]}
    assert names <= {"TOKENAUTH_CONFIG", "DATABASE_PASSWORD_FILE"}


@pytest.mark.parametrize("file", MANIFESTS, ids=lambda file: file.stem)
def test_services_and_probes_reach_the_pods(file: Path) -> None:
    found = objects(file)
    template = found["Deployment"]["spec"]["template"]
    (container,) = template["spec"]["containers"]
    assert container["ports"] == [{"name": "http", "containerPort": 8000}]
    assert "\nEXPOSE 8000\n" in DOCKERFILE
    probes = {name: probe["httpGet"] for name, probe in container.items() if name.endswith("Probe")}
    assert probes == {
        "startupProbe": {"path": "/healthz", "port": "http"},
        "livenessProbe": {"path": "/healthz", "port": "http"},
        "readinessProbe": {"path": "/readyz", "port": "http"},
    }
    assert found["Service"]["spec"]["selector"].items() <= template["metadata"]["labels"].items()
    assert found["Service"]["spec"]["ports"][0]["targetPort"] == "http"


def test_only_one_pod_uses_the_sqlite_file() -> None:
    spec = objects(DEPLOY / "kubernetes/sqlite.yaml")["Deployment"]["spec"]
    assert (spec["replicas"], spec["strategy"]) == (1, {"type": "Recreate"})
    assert spec["template"]["spec"]["securityContext"]["fsGroupChangePolicy"] == "OnRootMismatch"


def test_no_image_names_a_registry() -> None:
    texts = [DOCKERFILE, *(file.read_text() for file in DEPLOY.rglob("*.yaml"))]
    images = re.findall(r"(?:^FROM|^\s+(?:- )?image:) (\S+)", "\n".join(texts), re.MULTILINE)
    assert len(images) > 8
    assert [image for image in images if "/" in image] == []
