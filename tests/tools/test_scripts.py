"""setup.sh and test.sh against a Python that only notes what it is asked."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

import pilotfish

ROOT = Path(pilotfish.__file__).parent
STAND_IN = """\
#!/usr/bin/env bash
echo "$*" >>"$CALLS"
case "$*" in $FAILS) exit 1 ;; esac
echo "1 passed in 0.01s"
"""


class Checkout:
    """A copy of what the scripts read, whose .venv has a stand-in for Python."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.calls = folder, folder / "calls"
        for name in ("tools", "requirements"):
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", folder)
        python = folder / ".venv/bin/python"
        python.parent.mkdir(parents=True)
        python.write_text(STAND_IN)
        python.chmod(0o755)

    def run(self, script: str, fails: str = "nothing", **environ: str) -> subprocess.CompletedProcess[str]:
        self.calls.write_text("")
        env = {"PATH": os.environ["PATH"], "CALLS": str(self.calls), "FAILS": fails, **environ}
        command = ["bash", str(self.folder / "tools" / script)]
        return subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)

    def installed(self) -> list[str]:
        """Lock names in the order in which pip was asked for them."""
        lines = [line for line in self.calls.read_text().splitlines() if "pip install" in line]
        return [line.rpartition("/")[2].removesuffix(".txt") if "-r " in line else "pilotfish" for line in lines]


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


def test_setup_installs_in_order_and_only_once(checkout: Checkout) -> None:
    first = checkout.run("setup.sh")
    assert first.returncode == 0, first.stderr
    assert checkout.installed() == ["build", "edge", "pilotfish", "cloud-cpu"]
    assert all("--no-deps" in line for line in checkout.calls.read_text().splitlines() if "pip install" in line)
    assert "done (cloud-cpu)" in first.stdout
    assert checkout.run("setup.sh").returncode == 0
    assert checkout.installed() == []


def test_setup_runs_again_when_a_lock_changed(checkout: Checkout) -> None:
    checkout.run("setup.sh")
    with (checkout.folder / "requirements/edge.txt").open("a") as lock:
        lock.write("# changed\n")
    checkout.run("setup.sh")
    assert "edge" in checkout.installed()


def test_without_vllm_setup_says_so_each_time_and_goes_on(checkout: Checkout) -> None:
    first = checkout.run("setup.sh", fails="*cloud-cpu*")
    assert first.returncode == 0
    assert "done (edge)" in first.stdout
    again = checkout.run("setup.sh", fails="*cloud-cpu*")
    assert checkout.installed() == [], "not tried again while nothing changed"
    for told in (first, again):
        assert "vLLM is not installed" in told.stderr
        assert "PIP_EXTRA_INDEX_URL" in told.stderr
    checkout.run("setup.sh", PIP_EXTRA_INDEX_URL="somewhere")
    assert "cloud-cpu" in checkout.installed()


def test_in_ci_missing_vllm_is_an_error_however_often(checkout: Checkout) -> None:
    for _ in range(2):
        told = checkout.run("setup.sh", fails="*cloud-cpu*", CI="true")
        assert told.returncode == 1
        assert "in CI (CI=true) this is an error" in told.stderr


def test_a_failure_that_is_not_vllms_is_not_blamed_on_it(checkout: Checkout) -> None:
    told = checkout.run("setup.sh", fails="*edge.txt")
    assert told.returncode == 1
    assert "vLLM" not in told.stderr


def test_without_a_python_setup_names_the_way_out(checkout: Checkout) -> None:
    shutil.rmtree(checkout.folder / ".venv")
    told = checkout.run("setup.sh", PYTHON="no-such-python")
    assert told.returncode == 1
    assert "no Python >= 3.11" in told.stderr
    assert "make setup PYTHON=" in told.stderr


def test_the_engines_are_tested_in_processes_of_their_own(checkout: Checkout) -> None:
    told = checkout.run("test.sh")
    assert told.returncode == 0
    marks = [line.partition(" -m ")[2] for line in checkout.calls.read_text().splitlines() if "pytest" in line]
    assert marks == ["not llamacpp and not vllm", "llamacpp and not vllm", "vllm"]
    assert [line.partition(": ")[2].strip() for line in told.stdout.splitlines()[-3:]] == ["1 passed in 0.01s"] * 3


@pytest.mark.parametrize("fails", ["*not llamacpp*", "*-m llamacpp*", "*-m vllm*"])
def test_one_failing_process_fails_the_whole(checkout: Checkout, fails: str) -> None:
    assert checkout.run("test.sh", fails=fails).returncode == 1


def test_without_vllm_its_tests_are_left_out_aloud_and_in_ci_it_fails(checkout: Checkout) -> None:
    told = checkout.run("test.sh", fails="*find_spec*")
    assert told.returncode == 0
    assert "vLLM is not installed" in told.stdout
    assert checkout.run("test.sh", fails="*find_spec*", CI="true").returncode == 1
