from __future__ import annotations

import subprocess
import sys

import pytest

from pilotfish.protocol import cores


def test_a_list_of_cores_is_read() -> None:
    assert cores.parse("0,3") == [0, 3]
    assert cores.parse(None) == cores.parse("") == []


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux binds a process to cores")
def test_a_bound_process_stays_on_its_core_and_unknown_cores_are_left_out() -> None:
    first = cores.available()[0]
    program = f"from pilotfish.protocol import cores; cores.bind('{first},9999'); print(cores.available())"
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert said.stdout.strip() == f"[{first}]"
    assert "no cores [9999]" in said.stderr
