"""Prometheus and Grafana as the compose file's profile `obs` starts them: every metric real."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

import pilotfish
from composed import compose
from pilotfish.protocol import metrics
from pilotfish.protocol.settings import load

ROOT = Path(pilotfish.__file__).parent
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "compose.yaml").read_text())
DASHBOARD: dict[str, Any] = json.loads((ROOT / "docker/grafana/dashboards/pilotfish.json").read_text())
QUERIES = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
LABELS = {"origin", "outcome", "route", "status", "fate", "job", "instance", "le"}


def exposed() -> set[str]:
    """Names as Prometheus knows them."""
    suffixes = {"counter": ["_total"], "gauge": [""], "histogram": ["_bucket", "_sum", "_count"]}
    return {family.name + suffix for family in metrics.REGISTRY.collect() for suffix in suffixes[family.type]}


@pytest.mark.parametrize("query", QUERIES)
def test_the_dashboard_asks_for_metrics_and_labels_there_are(query: str) -> None:
    names = set(re.findall(r"pilotfish_\w+", query))
    assert names
    assert names <= exposed()
    assert set(re.findall(r"by \(([\w, ]+)\)", query.replace(", ", ") by ("))) <= LABELS


def test_panels_do_not_overlap() -> None:
    cells = [
        (x, y)
        for panel in DASHBOARD["panels"]
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]
    assert len(cells) == len(set(cells))


def test_what_is_mounted_is_there_and_leads_to_each_other() -> None:
    mounts = dict(
        volume.removesuffix(":ro").split(":")
        for name in ("prometheus", "grafana")
        for volume in COMPOSE["services"][name]["volumes"]
    )
    for source in mounts:
        assert source in COMPOSE["volumes"] or (ROOT / source).exists(), source
    provider = yaml.safe_load((ROOT / "docker/grafana/provisioning/dashboards/pilotfish.yaml").read_text())
    assert provider["providers"][0]["options"]["path"] == mounts["./docker/grafana/dashboards"]
    source = yaml.safe_load((ROOT / "docker/grafana/provisioning/datasources/prometheus.yaml").read_text())
    assert {panel["datasource"]["uid"] for panel in DASHBOARD["panels"]} == {source["datasources"][0]["uid"]}


def test_prometheus_scrapes_the_ports_that_are_served_with_the_key_that_is_set() -> None:
    config = yaml.safe_load((ROOT / "docker/prometheus.yml").read_text())
    assert COMPOSE["secrets"]["api_key"] == {"environment": "PILOTFISH_API_KEY"}
    scraped = set[str]()
    for job, setting in zip(config["scrape_configs"], ("metrics_port", "serve_port"), strict=True):
        (found,) = job["dns_sd_configs"]
        assert [getattr(settings_of(name), setting) for name in found["names"]] == [found["port"]] * len(found["names"])
        scraped |= {*found["names"]}
        assert job["authorization"]["credentials_file"] == "/run/secrets/api_key"
    assert scraped == {name for name, service in COMPOSE["services"].items() if "build" in service}


def settings_of(service: str) -> Any:
    """As the container would read them."""
    environment = compose()["services"][service]["environment"]
    return load(environ={name: str(value) for name, value in environment.items()})
