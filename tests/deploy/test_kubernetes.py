"""The manifests: built by kustomize, held against Kubernetes' schemas, and their probes tried on a server."""

import base64
import shutil
from pathlib import Path
from typing import Any

import httpx
import kubernetes_validate
import pytest
import yaml
from kubernetes_validate.utils import SchemaNotFoundError

from tests.deploy.conftest import DEPLOY, KEY, longest_stop, run_tool, serve_options, yaml_of
from tests.deploy.test_container import exec_form
from tests.serve.conftest import Server

OLDEST = "1.29"  # whose schemas it has to fit, beside the newest ones
SCALED = """\
apiVersion: kustomize.config.k8s.io/v1beta1
kind: Kustomization
resources: [../gpu]
components: [../autoscaling]
"""


@pytest.fixture(scope="module")
def manifests(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """For each overlay what kubectl would apply, by kind. `scaled` is a GPU's, with the autoscaler."""
    folder = tmp_path_factory.mktemp("kubernetes") / "kubernetes"
    shutil.copytree(DEPLOY / "kubernetes", folder)
    (folder / "base" / "slipstream.env").write_text(f"SLIPSTREAM_API_KEY={KEY}\n")
    (folder / "scaled").mkdir()
    (folder / "scaled" / "kustomization.yaml").write_text(SCALED)
    return {name: built(folder / name) for name in ("base", "gpu", "scaled")}


def built(folder: Path) -> dict[str, Any]:
    return {each["kind"]: each for each in yaml.safe_load_all(run_tool("kubectl", "kustomize", folder))}


def container(of: dict[str, Any]) -> Any:
    [only] = of["Deployment"]["spec"]["template"]["spec"]["containers"]
    return only


def test_they_fit_the_schemas(manifests: dict[str, dict[str, Any]]) -> None:
    unknown = set()
    for manifest in [each for overlay in manifests.values() for each in overlay.values()]:
        for version in (OLDEST, kubernetes_validate.latest_version()):
            try:
                kubernetes_validate.validate(manifest, version, strict=True)
            except SchemaNotFoundError:
                unknown.add(manifest["kind"])
    assert unknown == {"PodMonitor"}  # of Prometheus' operator


def test_labels_tie_them_together(manifests: dict[str, dict[str, Any]]) -> None:
    scaled = manifests["scaled"]
    labels = scaled["Deployment"]["spec"]["template"]["metadata"]["labels"]
    assert labels and scaled["Service"]["spec"]["selector"] == labels
    for kind in ("Deployment", "PodDisruptionBudget", "PodMonitor"):
        assert scaled[kind]["spec"]["selector"] == {"matchLabels": labels}
    assert scaled["HorizontalPodAutoscaler"]["spec"]["scaleTargetRef"]["name"] == "slipstream"
    claim = scaled["Deployment"]["spec"]["template"]["spec"]["volumes"][0]["persistentVolumeClaim"]["claimName"]
    assert scaled["PersistentVolumeClaim"]["metadata"]["name"] == claim


def test_the_server_has_its_options_and_the_time_to_end(manifests: dict[str, dict[str, Any]]) -> None:
    for overlay in manifests.values():
        pod, only = overlay["Deployment"]["spec"]["template"]["spec"], container(overlay)
        options = serve_options(exec_form("ENTRYPOINT")[2:] + only["args"])
        assert [port["containerPort"] for port in only["ports"]] == [options["port"]]
        program, seconds = only["lifecycle"]["preStop"]["exec"]["command"]
        assert program == "sleep"
        assert pod["terminationGracePeriodSeconds"] >= float(seconds) + longest_stop(options)
        assert pod["securityContext"]["runAsUser"] == 1000  # the image's


def test_probes_ask_what_the_server_answers_without_a_key(
    manifests: dict[str, dict[str, Any]], guarded: Server
) -> None:
    only = container(manifests["base"])
    probes = ("readinessProbe", "livenessProbe")
    for name in ("startupProbe", *probes):
        asked = only[name]["httpGet"]
        assert asked["port"] == "http"
        assert httpx.get(guarded.url + asked["path"]).status_code == 200
    ready, alive = (only[name]["failureThreshold"] * only[name]["periodSeconds"] for name in probes)
    assert ready <= 10 < 300 <= alive  # an engine that is started again takes its pod out of the service, not its life


def test_the_key_reaches_the_server_and_prometheus(manifests: dict[str, dict[str, Any]]) -> None:
    secret = manifests["scaled"]["Secret"]
    assert base64.b64decode(secret["data"]["SLIPSTREAM_API_KEY"]).decode() == KEY
    assert container(manifests["scaled"])["envFrom"] == [{"secretRef": {"name": secret["metadata"]["name"]}}]
    [endpoint] = manifests["scaled"]["PodMonitor"]["spec"]["podMetricsEndpoints"]
    assert endpoint["authorization"]["credentials"] == {"name": secret["metadata"]["name"], "key": "SLIPSTREAM_API_KEY"}
    assert endpoint["port"] == container(manifests["scaled"])["ports"][0]["name"]


def test_the_autoscaler_asks_for_what_the_adapter_offers(manifests: dict[str, dict[str, Any]]) -> None:
    [metric] = manifests["scaled"]["HorizontalPodAutoscaler"]["spec"]["metrics"]
    [rule] = yaml_of(DEPLOY / "kubernetes/autoscaling/prometheus-adapter.yaml")["rules"]["custom"]
    assert metric["pods"]["metric"]["name"] == rule["name"]["as"]


def test_a_gpu_is_asked_for_with_its_image(manifests: dict[str, dict[str, Any]]) -> None:
    plain, gpu = container(manifests["base"]), container(manifests["gpu"])
    assert gpu["resources"]["limits"]["nvidia.com/gpu"] == "1" and "nvidia.com/gpu" not in plain["resources"]["limits"]
    assert gpu["image"] == plain["image"] + "-cuda"
