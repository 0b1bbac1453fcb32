"""Skipped tests, watched: in CI each needs a line with its reason in allowed_skips.txt."""

from __future__ import annotations

import os
from fnmatch import fnmatch
from pathlib import Path

import pytest

ALLOWED_SKIPS = Path(__file__).parent / "allowed_skips.txt"


class Skips:
    """Collects what was skipped, and fails a run in CI for what is not on the list."""

    def __init__(self, allowed: list[str]) -> None:
        self.allowed = allowed
        self.surprising: list[str] = []

    def _note(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        skipped = report.skipped and not hasattr(report, "wasxfail")
        if skipped and not any(fnmatch(report.nodeid, pattern) for pattern in self.allowed):
            self.surprising.append(report.nodeid)

    pytest_runtest_logreport = pytest_collectreport = _note

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Turn a pass into a failure."""
        if self.surprising and os.environ.get("CI") == "true" and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Name them."""
        for nodeid in self.surprising:
            terminalreporter.write_line(f"skipped, and not in {ALLOWED_SKIPS.name}: {nodeid}", red=True)


def allowed_skips(text: str) -> list[str]:
    """Patterns of `<test id or pattern>  # <reason>` lines. ValueError for a line without a reason."""
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]
    if silent := [line for line in lines if not line.partition("  # ")[2].strip()]:
        raise ValueError(f"{ALLOWED_SKIPS.name}: no reason given in {silent[0]!r}")
    return [line.partition("  # ")[0].strip() for line in lines]
