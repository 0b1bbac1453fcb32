"""A benchmark's other processes: one that does not come up is told."""

from __future__ import annotations

import pytest

from pilotfish.bench import children
from pilotfish.protocol.errors import EngineError


def test_one_that_ends_before_it_is_ready_is_told() -> None:
    with pytest.raises(EngineError, match="ended before it was ready"), children.child("no_such_module"):
        pass


def test_one_that_hangs_before_it_is_ready_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(children, "START_SECONDS", 0.05)
    waits = ("chaos_child", "worker", "redis://127.0.0.1:1/0", "w0", "")
    with pytest.raises(EngineError, match="chaos_child process is not ready after 0.05 s"), children.child(*waits):
        pass
