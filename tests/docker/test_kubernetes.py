"""docker/kubernetes/: kinds, selectors, references between the objects, settings and metrics. No cluster here."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from composed import ROOT, redis_of
from pilotfish.protocol import metrics
from pilotfish.protocol.errors import SettingsError
from pilotfish.protocol.http_guard import access
from pilotfish.protocol.settings import load

FOLDER = ROOT / "docker/kubernetes"
OBJECTS: list[dict[str, Any]] = [
    one
    for name in yaml.safe_load((FOLDER / "kustomization.yaml").read_text())["resources"]
    for one in yaml.safe_load_all((FOLDER / name).read_text())
]
WORKLOADS = [one for one in OBJECTS if one["kind"] in ("Deployment", "StatefulSet")]
OURS = [one for one in WORKLOADS if one["metadata"]["name"] != "redis"]
SECRET = set(re.findall(r"--from-literal=([\w-]+)=", (FOLDER / "README.md").read_text()))
NAMES = [one["metadata"]["name"] for one in WORKLOADS]


def only(kind: str, name: str) -> dict[str, Any]:
    (found,) = [one for one in OBJECTS if one["kind"] == kind and one["metadata"]["name"] == name]
    return found


def container(workload: dict[str, Any]) -> dict[str, Any]:
    (found,) = workload["spec"]["template"]["spec"]["containers"]
    return dict(found)


def test_every_file_is_in_the_kustomization_and_every_kind_has_its_group() -> None:
    listed = yaml.safe_load((FOLDER / "kustomization.yaml").read_text())["resources"]
    assert {path.name for path in FOLDER.glob("*.yaml")} == {*listed, "kustomization.yaml"}
    assert {(one["apiVersion"], one["kind"]) for one in OBJECTS} == {
        ("v1", "ConfigMap"), ("v1", "Service"), ("apps/v1", "StatefulSet"), ("apps/v1", "Deployment"),
        ("monitoring.coreos.com/v1", "PodMonitor"), ("keda.sh/v1alpha1", "ScaledObject"),
    }  # fmt: skip


@pytest.mark.parametrize("workload", WORKLOADS, ids=NAMES)
def test_selectors_choose_their_pods_and_mounts_their_volumes(workload: dict[str, Any]) -> None:
    spec = workload["spec"]
    pod = spec["template"]["spec"]
    assert spec["selector"]["matchLabels"].items() <= spec["template"]["metadata"]["labels"].items()
    volumes = {one["name"] for one in pod.get("volumes", [])}
    volumes |= {one["metadata"]["name"] for one in spec.get("volumeClaimTemplates", [])}
    assert {one["name"] for one in container(workload)["volumeMounts"]} == volumes
    assert pod["securityContext"]["runAsNonRoot"]
    keys = [one["valueFrom"]["secretKeyRef"]["key"] for one in container(workload)["env"] if "valueFrom" in one]
    assert set(keys) <= SECRET


def test_services_and_the_monitor_lead_to_ports_of_pods() -> None:
    for service in (one for one in OBJECTS if one["kind"] == "Service"):
        (workload,) = [one for one in WORKLOADS if service["spec"]["selector"].items() <= labels(one).items()]
        assert {one["targetPort"] for one in service["spec"]["ports"]} <= ports(workload)
    monitor = only("PodMonitor", "pilotfish-worker")["spec"]
    worker = only("Deployment", "pilotfish-worker")
    assert monitor["selector"]["matchLabels"].items() <= labels(worker).items()
    assert {one["port"] for one in monitor["podMetricsEndpoints"]} <= ports(worker)


def labels(workload: dict[str, Any]) -> dict[str, str]:
    return dict(workload["spec"]["template"]["metadata"]["labels"])


def ports(workload: dict[str, Any]) -> set[str]:
    return {one["name"] for one in container(workload)["ports"]}


@pytest.mark.parametrize("workload", OURS, ids=[one["metadata"]["name"] for one in OURS])
def test_settings_are_settings_probes_ask_for_health_and_the_grace_is_longer_than_a_drain(
    workload: dict[str, Any],
) -> None:
    one = container(workload)
    environ = {entry["name"]: str(entry.get("value", "x")) for entry in one["env"]}
    settings = load(environ=environ)
    (port,) = one["ports"]
    assert port["containerPort"] == (settings.metrics_port or settings.serve_port)
    assert one["command"][0] == "pilotfish"
    probes = {name: one[name]["exec"]["command"] for name in ("startupProbe", "livenessProbe", "readinessProbe")}
    health = ["pilotfish", "health"]
    assert probes == {"startupProbe": health, "livenessProbe": health, "readinessProbe": [*health, "--ready"]}
    assert workload["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] > 30
    assert "replicas" in workload["spec"] or workload["metadata"]["name"] == scaled()["scaleTargetRef"]["name"]


def test_what_kubernetes_says_of_our_services_is_not_read_as_settings() -> None:
    """A service's name becomes variables in every pod that starts after it: pilotfish-agent's would be ours."""
    told = {f"{one['metadata']['name'].upper().replace('-', '_')}_PORT" for one in OBJECTS if one["kind"] == "Service"}
    with pytest.raises(SettingsError, match="unknown setting"):
        load(environ=dict.fromkeys(told, "tcp://10.0.0.1:8787"))
    assert all(one["spec"]["template"]["spec"]["enableServiceLinks"] is False for one in OURS)


def test_an_agent_answers_to_the_names_of_its_service() -> None:
    (namespace,) = re.findall(r"create namespace (\S+)", (FOLDER / "README.md").read_text())
    environ = {
        one["name"]: str(one.get("value", "x")) for one in container(only("Deployment", "pilotfish-agent"))["env"]
    }
    name = only("Service", "pilotfish-agent")["metadata"]["name"]
    assert {name, f"{name}.{namespace}.svc"} <= access(load(environ=environ)).hosts


def test_workers_go_one_at_a_time() -> None:
    down = scaled()["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]["scaleDown"]
    assert down["stabilizationWindowSeconds"] >= 300
    assert [policy["value"] for policy in down["policies"]] == [1]


def scaled() -> dict[str, Any]:
    return dict(only("ScaledObject", "pilotfish-worker")["spec"])


def test_workers_follow_the_age_of_jobs_as_it_is_really_measured() -> None:
    (trigger,) = scaled()["triggers"]
    assert (trigger["type"], trigger["metricType"]) == ("prometheus", "Value")
    (name,) = re.findall(r"pilotfish_\w+", trigger["metadata"]["query"])
    buckets = {f"{family.name}_bucket" for family in metrics.REGISTRY.collect() if family.type == "histogram"}
    assert name in buckets
    assert name == f"{next(iter(metrics.QUEUE_SECONDS.collect())).name}_bucket"
    assert float(trigger["metadata"]["threshold"]) > 0
    assert scaled()["minReplicaCount"] >= 1, "an empty fleet measures no ages"


def test_redis_takes_its_configuration(tmp_path: Path) -> None:
    content = only("ConfigMap", "redis")["data"]["redis.conf"]
    with redis_of(content + "requirepass redis-secret\n", tmp_path) as broker, broker.client() as client:
        assert client.config_get("maxmemory-policy") == {"maxmemory-policy": "noeviction"}
        assert client.config_get("appendonly") == {"appendonly": "yes"}
