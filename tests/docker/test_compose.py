"""compose.yaml: what the specification allows, what its header promises, and every command of it, run for real."""

from __future__ import annotations

import json
import os
import re
import subprocess
import urllib.request
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest

from composed import ROOT, SECRETS, Redis, Service, compose, redis_of, start
from helpers import wait_until_sync
from pages import DOCS, commands
from pilotfish.protocol.settings import Settings, load

# from the Compose specification (compose-spec/compose-spec, Apache-2.0), as check-jsonschema 0.39.0 ships it
SPECIFICATION: dict[str, Any] = json.loads(Path(__file__).with_name("compose-spec.json").read_text())
DRAIN_SECONDS = 30  # what docs/architecture.md promises and tests/chaos/test_times.py measures
SERVICES: dict[str, Any] = compose()["services"]
OURS = [name for name, service in SERVICES.items() if "build" in service]


def of_profile(*profiles: str) -> set[str]:
    return {name for name, one in SERVICES.items() if set(one.get("profiles", profiles)) <= set(profiles)}


def test_it_is_what_the_specification_allows() -> None:
    errors = [
        f"{error.instance_path}: {error.message}" for error in jsonschema_rs.iter_errors(SPECIFICATION, compose())
    ]
    assert not errors


def test_the_specification_would_tell() -> None:
    broken = compose()
    broken["services"]["worker"]["comand"] = "x"
    assert not jsonschema_rs.is_valid(SPECIFICATION, broken)


def test_without_a_profile_it_is_redis_a_worker_and_an_agent() -> None:
    assert of_profile() == {"redis", "worker", "agent"}
    assert of_profile("gpu") - of_profile() == {"worker-gpu", "agent-gpu"}
    assert of_profile("obs") - of_profile() == {"prometheus", "grafana"}


@pytest.mark.parametrize("name", SERVICES)
def test_what_a_service_leans_on_is_there(name: str) -> None:
    service = SERVICES[name]
    assert "build" in service or re.search(r":v?[0-9.]+$", service["image"]), "an image has a version"
    assert set(service.get("depends_on", {})) <= SERVICES.keys()
    for volume in service.get("volumes", []):
        source = volume.partition(":")[0]
        assert source in compose()["volumes"] or (ROOT / source).exists()


@pytest.mark.parametrize("secret", SECRETS)
def test_without_its_secrets_it_does_not_start(secret: str) -> None:
    with pytest.raises(KeyError, match=secret):
        compose({name: value for name, value in SECRETS.items() if name != secret})


def test_the_first_command_of_its_header_writes_the_secrets(tmp_path: Path) -> None:
    """Run with an `openssl` that is none: only the shell's part is ours."""
    (line,) = [line for line in header() if line.startswith("printf ")]
    (tmp_path / "openssl").write_text("#!/bin/sh\necho 0a1b\n")
    (tmp_path / "openssl").chmod(0o755)
    path = os.pathsep.join([str(tmp_path), os.environ["PATH"]])
    subprocess.run(["bash", "-c", line], cwd=tmp_path, env={"PATH": path}, check=True)
    assert (tmp_path / ".env").read_text().split() == [f"{name}=0a1b" for name in SECRETS]


def test_its_commands_name_its_services_and_the_docs_tell_no_others() -> None:
    told = [line for line in commands(DOCS / "fleet.md") if line.startswith("docker compose ")]
    named = re.findall(r"(?:--scale |--wait |exec )([\w-]+)", "\n".join([*header(), *told]))
    assert {*named} == {"worker", "agent", "worker-gpu"}
    assert {*re.findall(r"--profile (\w+)", " ".join(told))} <= {
        profile for one in SERVICES.values() for profile in one.get("profiles", [])
    }


def header() -> list[str]:
    """The commands at the head of the file."""
    return re.findall(r"(?m)^# {3}((?:printf|docker).*?)(?: {2,}#.*)?$", (ROOT / "compose.yaml").read_text())


@pytest.mark.parametrize("name", OURS)
def test_a_container_of_ours_may_do_nothing_it_need_not(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"]
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))


@pytest.mark.parametrize("name", OURS)
def test_a_drain_ends_before_the_grace(name: str) -> None:
    from pilotfish.cli.run import DRAIN_SECONDS as AGENTS
    from pilotfish.cloud_worker.worker import DRAIN_SECONDS as WORKERS

    assert max(AGENTS, WORKERS) < DRAIN_SECONDS
    assert float(SERVICES[name]["stop_grace_period"].removesuffix("s")) > DRAIN_SECONDS


def test_workers_can_be_scaled() -> None:
    for name in ("worker", "worker-gpu"):
        assert not {"container_name", "ports", "hostname"} & SERVICES[name].keys()
        assert not {"PILOTFISH_AGENT", "PILOTFISH_CORES"} & SERVICES[name]["environment"].keys()


@pytest.mark.parametrize("name", OURS)
def test_its_settings_are_settings_and_its_commands_are_commands(name: str) -> None:
    settings = settings_of(name)
    assert settings.api_key, "what is served beyond this machine has a key"
    assert SERVICES[name]["command"][0] == "pilotfish"
    assert SERVICES[name]["healthcheck"]["test"] == ["CMD", "pilotfish", "health"]


def test_the_gpu_pair_is_one_pair_and_asks_its_own_worker() -> None:
    worker, agent, demo = (settings_of(name) for name in ("worker-gpu", "agent-gpu", "agent"))
    assert worker.preset == agent.preset == "qwen3-8b"
    assert (worker.engine, agent.target, demo.target) == ("vllm", "Qwen3-8B", "demo-target")


def settings_of(service: str) -> Settings:
    """As the container would read them."""
    told = {name: str(value) for name, value in SERVICES[service]["environment"].items()}
    return load(environ={name: value for name, value in told.items() if name != "HF_TOKEN"})


@pytest.mark.slow
@pytest.mark.llamacpp
def test_every_command_of_the_default_profile_runs_and_an_answer_comes(tmp_path: Path) -> None:
    """Redis as configured, two workers (`--scale worker=2`), the agent; health checks, a prompt, the page, the end."""
    (tmp_path / "redis").mkdir()
    (tmp_path / "models").mkdir()
    running: list[Service] = []
    with redis_of(compose()["configs"]["redis"]["content"], tmp_path / "redis") as broker:
        check_redis(broker)
        try:
            for name in ("worker", "worker", "agent"):
                running.append(started(name, broker, tmp_path, len(running)))
            assert running[-1].run(["pilotfish", "submit", "What is 12 plus 30?"]).stdout == "12 + 30 = 42\n"
            page = f"http://127.0.0.1:{running[-1].environ['PILOTFISH_SERVE_PORT']}/"
            with urllib.request.urlopen(page, timeout=10) as answer:
                assert b"<html" in answer.read().lower()
        finally:
            codes = [one.stop(float(SERVICES["worker"]["stop_grace_period"][:-1])) for one in reversed(running)]
        assert codes == [0, 0, 0]
    assert list((tmp_path / "redis").rglob("*.aof*")), "what was queued survives a restart"


def check_redis(broker: Redis) -> None:
    command = SERVICES["redis"]["healthcheck"]["test"][1]
    assert broker.check(command) == 0
    assert broker.check(command.replace("ping", "-a wrong ping")) != 0
    wanted = {"appendonly": "yes", "maxmemory-policy": "noeviction", "proto-max-bulk-len": "1048576"}
    with broker.client() as client:
        assert {name: client.config_get(name)[name] for name in wanted} == wanted


def started(name: str, broker: Redis, folder: Path, number: int) -> Service:
    """A service once its own health check passes."""
    told = SERVICES[name]
    service = start(told["command"], told["environment"], broker, folder / "models", folder / f"{name}{number}.log")
    check = told["healthcheck"]["test"][1:]
    wait_until_sync(lambda: service.healthy(check), f"{name} healthy", timeout=60)
    return service
