"""A page's console blocks, run in order as a reader would: commands really run, what is shown must really be printed.

    ```console            each `$ command` runs to its end; the lines below it are what it prints
    ```console stays      the command goes on running (another shell); the block ends when its last line is printed
    ```python file=x.py   written to the reader's folder

A shown line must be printed, and in that order; lines may be left out. `…` stands for anything, and a number or a
hexadecimal name for any other, except where a number is all there is on the line: that is an answer.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from helpers import wait_until_sync
from pages import Fence

TIMEOUT_SECONDS = 120.0
PROGRAMS = {"pilotfish": [sys.executable, "-m", "pilotfish.cli.main"], "python": [sys.executable]}


@dataclass(frozen=True)
class Step:
    """One command and the lines that are shown of what it prints."""

    command: str
    shown: list[str]


def steps(block: Fence) -> list[Step]:
    """The commands of a console block."""
    found: list[Step] = []
    for line in block.text.replace("\\\n", " ").splitlines():
        if line.startswith("$ "):
            found.append(Step(line[2:], []))
        elif line.strip():
            found[-1].shown.append(line.strip())
    return found


def pattern(shown: str) -> re.Pattern[str]:
    """What a shown line allows to be printed."""
    if shown.isdecimal():
        return re.compile(re.escape(shown))
    loose = {"…": ".*", " ": r"\s+"}
    words = re.split(r"(…|\s+|\b[0-9a-f]*\d[0-9a-f]*\b(?:[.,]\d+)*)", shown)
    plain = [re.escape(word) if word not in ("round", "rounds") else "rounds?" for word in words]
    parts = [loose.get(word[:1], r"[0-9a-f.,]+") if index % 2 else plain[index] for index, word in enumerate(words)]
    return re.compile("".join(parts))


def missing(shown: Iterable[str], printed: str) -> str | None:
    """The first shown line that is not printed after those before it; None if all are."""
    lines = iter([line.strip() for line in printed.splitlines()])
    return next((line for line in shown if not any(pattern(line).fullmatch(other) for other in lines)), None)


@dataclass
class Background:
    """A command that goes on running; what it printed so far."""

    command: str
    process: subprocess.Popen[str]
    printed: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout
        with self.process.stdout as lines:
            self.printed.extend(lines)

    @property
    def text(self) -> str:
        return "".join(self.printed)

    def stop(self) -> None:
        """As Ctrl-C or a service manager would; it must end by itself, and well."""
        os.killpg(self.process.pid, signal.SIGTERM)
        code = self.process.wait(60)
        self._reader.join()
        assert code in (0, -signal.SIGTERM), f"$ {self.command}\nended with {code}:\n{self.text}"


class Reader:
    """Somebody who types a page's commands in `folder`; `env` is added to this process' own."""

    def __init__(self, folder: Path, env: dict[str, str]) -> None:
        self.folder, self.running = folder, list[Background]()
        bin_ = folder / ".bin"
        bin_.mkdir()
        for program, words in {
            "pilotfish": [sys.executable, "-m", "pilotfish.cli.main"],
            "python": [sys.executable],
        }.items():
            (bin_ / program).write_text(f'#!/bin/sh\nexec {shlex.join(words)} "$@"\n')
            (bin_ / program).chmod(0o755)
        path = os.pathsep.join([str(bin_), os.environ["PATH"]])
        self.env = {**os.environ, "PATH": path, "PYTHONUNBUFFERED": "1", **env}

    def read(self, block: Fence) -> None:
        """One block of the page."""
        if file := block.options.get("file"):
            (self.folder / file).write_text(block.text, encoding="utf-8")
        elif block.language == "console":
            for step in steps(block):
                (self._start if "stays" in block.options else self._run)(step)

    def _run(self, step: Step) -> None:
        if step.command.startswith("export "):
            name, _, value = shlex.split(step.command)[1].partition("=")
            self.env[name] = value
            return
        ran = subprocess.run(
            ["bash", "-c", step.command], cwd=self.folder, env=self.env, text=True, timeout=TIMEOUT_SECONDS,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        assert ran.returncode == 0, f"$ {step.command}\nended with {ran.returncode}:\n{ran.stdout}"
        line = missing(step.shown, ran.stdout)
        assert line is None, f"$ {step.command}\ndid not print {line!r} but\n{ran.stdout}"

    def _start(self, step: Step) -> None:
        process = subprocess.Popen(
            ["bash", "-c", f"exec {step.command}"], cwd=self.folder, env=self.env, text=True, start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        one = Background(step.command, process)
        self.running.append(one)
        try:
            wait_until_sync(
                lambda: missing(step.shown, one.text) is None or process.poll() is not None,
                step.command,
                TIMEOUT_SECONDS,
            )
        finally:
            line = missing(step.shown, one.text)
            assert line is None, f"$ {step.command}\ndid not print {line!r} but\n{one.text}"

    def leave(self) -> None:
        """End what still runs, the last first."""
        while self.running:
            self.running.pop().stop()
