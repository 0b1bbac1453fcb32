"""Saved KV states on disk: they survive a restart, and agents of one device share them.

A folder of files (`state_file.py`), each readable by its owner only, because ids are private. The files are the truth:
the least recently touched ones make room under the budget, whoever wrote them; what is damaged is told and removed; a
full disk is told and costs the state, never the agent. Writing happens on a thread of its own, one file at a time.
"""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path
from time import time_ns
from typing import NamedTuple

from pilotfish.cache import state_file
from pilotfish.cache.model_build import ModelBuild
from pilotfish.cache.prefix_map import PrefixMap, Shared
from pilotfish.cache.state_file import Header
from pilotfish.cache.state_lru import SLACK
from pilotfish.protocol.errors import BuildMismatch, StateError

SUFFIX = ".kv"
_log = logging.getLogger("pilotfish.cache")
_CLOCK_TICK_NS = 100_000_000  # a folder's time of change is no finer than a few of the kernel's ticks
_ABANDONED_NS = 3_600_000_000_000  # a file half written for so long has lost its writer


class Stored(NamedTuple):
    """A file of the folder: `used_ns` is when it was written or restored last; `header` None if it was not read."""

    path: Path
    n_bytes: int
    used_ns: int
    header: Header | None = None


class StateFolder:
    """The states of one model build, no longer than `context` tokens, in a folder that others may use too.

    One owner, like `StateLru`; `model` is a name for people.
    """

    def __init__(self, folder: Path, build: ModelBuild, *, model: str, context: int, budget_bytes: int) -> None:
        self.folder, self.build, self.model = folder, build, model
        self.context, self.budget_bytes = context, budget_bytes
        self._map = PrefixMap()
        self._known: dict[str, bytes | None] = {}  # file name -> its key, None if it is not for us
        self._scanned_ns = 0
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="kv-states")
        self._writing: Future[None] | None = None
        self._told = False  # that states cannot be written; once until one can

    # --- reading ---------------------------------------------------------------------------------------------

    def longest(self, key: bytes) -> Shared | None:
        """See `PrefixMap.longest`; what other agents have written meanwhile counts."""
        self._scan()
        return self._map.longest(key)

    def covers(self, key: bytes) -> bool:
        """Whether a file serves for this state; it is touched then."""
        self._settle()
        self._scan()
        found = self._map.covers(key, SLACK)
        if found is not None:
            with suppress(OSError):
                os.utime(self._path(found))
        return found is not None

    def __contains__(self, key: bytes) -> bool:
        return self._path(key).exists()

    def load(self, key: bytes) -> memoryview | None:
        """A state, checked; None if it is gone or damaged, which is told and its file removed."""
        path = self._path(key)
        try:
            with path.open("rb") as file:
                header = state_file.read_header(file)
                if header.key != key or header.build != self.build:
                    raise StateError("it is of other tokens or another model than its name says")
                state = state_file.read_state(file, header)
            os.utime(path)
        except FileNotFoundError:
            state = None
        except StateError as error:
            state = None
            _remove_damaged(path, error)
        except OSError as error:
            state = None
            _log.warning("the saved KV state %s cannot be read (%s): it is computed again", path, error)
        if state is None:
            self._forget(key)
        return state

    def drop(self, key: bytes) -> None:
        """Remove a state's file, if there is one."""
        with suppress(OSError):
            self._path(key).unlink(missing_ok=True)
        self._forget(key)

    def _forget(self, key: bytes) -> None:
        """Not to be found again, also where its file could not be removed."""
        self._map.discard(key)
        self._known[self._path(key).name] = None

    def _scan(self) -> None:
        """Take note of files that came and went since the last look."""
        try:
            if self._scanned_ns - _CLOCK_TICK_NS > self.folder.stat().st_mtime_ns > 0:
                return
            self._scanned_ns = time_ns()
            present = {entry.path.name for entry in entries(self.folder)}
        except OSError:
            present = set()
        for name in self._known.keys() - present:
            if key := self._known.pop(name):
                self._map.discard(key)
        for name in present - self._known.keys():
            self._learn(name)

    def _learn(self, name: str) -> None:
        stored = look(self.folder / name)
        header = stored.header if stored else None
        fits = header is not None and header.build == self.build and header.tokens <= self.context
        key = header.key if header and fits and self._path(header.key).name == name else None
        self._known[name] = key
        if key:
            self._map.add(key)

    def _path(self, key: bytes) -> Path:
        name = blake2b(self.build.fingerprint.encode() + key, digest_size=12).hexdigest()
        return self.folder / (name + SUFFIX)

    # --- writing ---------------------------------------------------------------------------------------------

    def save(self, key: bytes, state: memoryview) -> None:
        """Begin to write a state; waits for the one before. What it makes superfluous is removed after it."""
        self._settle()
        self._scan()
        covered = [self._path(one) for one in self._map.covered(key, SLACK)]
        self._writing = self._writer.submit(self._write, key, state, covered)

    def _settle(self) -> None:
        if self._writing:
            self._writing.result()

    def add(self, header: Header, state: memoryview) -> bool:
        """Write a state that another agent exported, now; False if it exceeds context or budget. Raises OSError."""
        fits = header.tokens <= self.context
        return fits and store(self.folder, self._path(header.key), header, state, self.budget_bytes)

    def _write(self, key: bytes, state: memoryview, covered: list[Path]) -> None:
        header = state_file.describe(self.build, self.model, key, state)
        try:
            if not store(self.folder, self._path(key), header, state, self.budget_bytes):
                return
            for path in covered:
                path.unlink(missing_ok=True)
            self._told = False
        except OSError as error:
            if not self._told:
                advice = "free some room, lower --edge-cache-disk-mb or set --cache-dir"
                _log.warning("KV states cannot be kept in %s (%s): %s", self.folder, error.strerror or error, advice)
            self._told = True

    def close(self) -> None:
        """Finish writing."""
        self._settle()
        self._writer.shutdown()


def store(folder: Path, path: Path, header: Header, state: memoryview, budget_bytes: int) -> bool:
    """Write one file, whole or not at all, and make room for it. False if it exceeds the budget. Raises OSError."""
    n_bytes = state_file.size(header)
    if n_bytes > budget_bytes:
        return False
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    make_room(folder, budget_bytes - n_bytes, keep=path)
    half = path.with_name(f"{path.stem}.{secrets.token_hex(4)}.tmp")
    try:
        with open(os.open(half, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            state_file.write(file, header, state)
        half.replace(path)
    except OSError:
        half.unlink(missing_ok=True)
        raise
    return True


def make_room(folder: Path, budget_bytes: int, keep: Path) -> None:
    """Remove the least recently used files until the others fit; `keep` is about to be replaced and does not count."""
    for half in folder.glob("*.tmp"):
        with suppress(OSError):
            if time_ns() - half.stat().st_mtime_ns > _ABANDONED_NS:
                half.unlink()
    found = sorted((one for one in entries(folder) if one.path != keep), key=lambda one: one.used_ns)
    total = sum(one.n_bytes for one in found)
    for one in found:
        if total <= budget_bytes:
            return
        one.path.unlink(missing_ok=True)
        total -= one.n_bytes


# --- looking at a folder -------------------------------------------------------------------------------------


def entries(folder: Path) -> Iterator[Stored]:
    """Its states, unread; nothing if there is no such folder. Raises OSError for one that cannot be read."""
    try:
        listed = list(os.scandir(folder))
    except FileNotFoundError:
        return
    for entry in listed:
        if entry.name.endswith(SUFFIX):
            with suppress(FileNotFoundError):
                stat = entry.stat()
                yield Stored(Path(entry.path), stat.st_size, stat.st_mtime_ns)


def look(path: Path) -> Stored | None:
    """One state with its header; None if it is another version's, gone, or damaged: that is told and removed."""
    try:
        stat = path.stat()
        with path.open("rb") as file:
            return Stored(path, stat.st_size, stat.st_mtime_ns, state_file.read_header(file))
    except (FileNotFoundError, BuildMismatch):
        return None
    except StateError as error:
        _remove_damaged(path, error)
    except OSError as error:
        _log.warning("the saved KV state %s cannot be read (%s): it is left out", path, error)
    return None


def _remove_damaged(path: Path, error: StateError) -> None:
    _log.warning("the saved KV state %s is not used and is removed: %s", path, error)
    with suppress(OSError):
        path.unlink(missing_ok=True)
