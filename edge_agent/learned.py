"""What agents have learnt of a pair, on disk: one JSON file per (draft, target, temperature, strategy).

A file holds sums, so that saving is adding: read what is there, add what is new, replace the file at once (a rename),
all under a lock. Several agents of one machine share a folder; `merge` takes in another machine's. What cannot be
written stays with the caller and is tried again; a file that cannot be read is set aside, never overwritten.
"""

from __future__ import annotations

import fcntl
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import numpy as np

from pilotfish.edge_agent.calibration import BINS, Sums
from pilotfish.protocol.errors import StoreError

VERSION = 1
MAX_BYTES = 1_000_000


@dataclass(frozen=True, slots=True)
class Key:
    """Whose scores these are; all four change what a score means."""

    draft: str  # fingerprint
    target: str
    temperature: float
    strategy: str

    @property
    def file_name(self) -> str:
        """Short, the same everywhere, and free of characters a file system minds."""
        whole = json.dumps([self.draft, self.target, round(self.temperature, 2), self.strategy])
        return f"{self.strategy[:24]}-T{self.temperature:g}-{sha256(whole.encode()).hexdigest()[:16]}.json"


class Store:
    """A folder of such files; made when something is first saved."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def load(self, key: Key) -> Sums:
        """What is known; {} for a new pair. Raises StoreError for a file that cannot be read, which is set aside."""
        path = self.folder / key.file_name
        try:
            return _read(path)
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise StoreError(
                f"what was learnt cannot be read from {path} ({error.strerror}): check its rights"
            ) from error
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            aside = path.with_suffix(f".broken-{os.getpid()}")
            with suppress(OSError):
                path.replace(aside)
            raise StoreError(
                f"{path} is not what pilotfish wrote ({error}): it is kept as {aside.name}, and learning starts anew"
            ) from error

    def known(self) -> list[Key]:
        """Whose sums are here; files that cannot be read are left out."""
        found = []
        for path in sorted(self.folder.glob("*.json")):
            with suppress(OSError, ValueError, TypeError, KeyError):
                found.append(Key(**json.loads(path.read_bytes())["key"]))
        return found

    def add(self, key: Key, fresh: Sums) -> Sums:
        """Add sums to what the file holds, and return the total.

        Raises StoreError if it cannot be written (a full disk): the file is then as it was, and `fresh` is still the
        caller's to save later.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._locked(key):
                total = added(self.load(key), fresh)
                self._replace(key, total)
        except OSError as error:
            raise StoreError(
                f"what was learnt cannot be saved in {self.folder} ({error.strerror}): free some space or set "
                "--cache-dir; it is kept in memory and tried again"
            ) from error
        return total

    def merge(self, other: Path) -> int:
        """Take in every file of another agent's folder; returns how many. Raises StoreError at the first bad one."""
        merged = 0
        for path in sorted(other.glob("*.json")):
            with suppress(FileNotFoundError):
                try:
                    body = json.loads(path.read_text(encoding="utf-8"))
                    key, sums = Key(**body["key"]), _read(path)
                except (ValueError, TypeError, KeyError, AttributeError) as error:
                    raise StoreError(f"{path} is not what pilotfish wrote ({error}): leave it out") from error
                self.add(key, sums)
                merged += 1
        return merged

    @contextmanager
    def _locked(self, key: Key) -> Iterator[None]:
        with (self.folder / f"{key.file_name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _replace(self, key: Key, sums: Sums) -> None:
        """A new file under a name of its own, then one rename: a reader sees the old or the new, never a part."""
        whose = {name: getattr(key, name) for name in ("draft", "target", "temperature", "strategy")}
        body = {"version": VERSION, "key": whose, "sums": {name: array.tolist() for name, array in sums.items()}}
        handle, draft = tempfile.mkstemp(dir=self.folder, prefix=".saving-")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump(body, file)
                file.flush()
                os.fsync(file.fileno())
            Path(draft).replace(self.folder / key.file_name)
        except BaseException:
            with suppress(OSError):
                Path(draft).unlink()
            raise


def added(known: Sums, fresh: Sums) -> Sums:
    """Name by name; a sum never falls below 0 (an agent that forgets subtracts what it knew)."""
    zero = np.zeros(1)
    names = {**known, **fresh}
    return {name: np.maximum(0.0, known.get(name, zero) + fresh.get(name, zero)) for name in names}


def _read(path: Path) -> Sums:
    """Raises OSError, or one of several errors for content that is not ours."""
    data = path.read_bytes()
    if len(data) > MAX_BYTES:
        raise ValueError(f"{len(data)} bytes are too many")
    body = json.loads(data)
    if body["version"] != VERSION:
        raise ValueError(f"its version is {body['version']!r}, not {VERSION}")
    sums = {str(name): np.asarray(values, dtype=np.float64) for name, values in body["sums"].items()}
    for name, array in sums.items():
        if array.shape not in ((1,), (BINS,)) or not np.isfinite(array).all() or (array < 0).any():
            raise ValueError(f"{name!r} is neither one sum nor {BINS}")
    return sums
