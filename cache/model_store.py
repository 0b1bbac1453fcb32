"""Models fetched from a hub, on this disk: `ORG/REPO@COMMIT/` with the files, `ORG/REPO@COMMIT.json` with the record.

The record says what each file was when it came: bytes, SHA-256, time of change. A file that is no longer that is
refused at its next use; it is read again only if size or time differ, since a start must not read 15 GB. What a branch
such as `main` stands for is settled by the first pull and stays until the next: starts ask no hub. Knows no network.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict, ValidationError

from pilotfish.cache.hub_name import HubName, shards
from pilotfish.protocol.errors import ModelError

log = logging.getLogger(__name__)
SHORT = 12  # digits of a commit in a folder's name


class FileRecord(BaseModel):
    """A file as it was when it came."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    bytes: int
    sha256: str
    mtime_ns: int

    @classmethod
    def of(cls, path: Path) -> Self:
        """Read the whole file."""
        stat = path.stat()
        return cls(bytes=stat.st_size, sha256=sha256(path), mtime_ns=stat.st_mtime_ns)


class Record(BaseModel):
    """What was fetched of one commit. `whole` is set once every file of the folder is there."""

    model_config = ConfigDict(extra="forbid")
    repo: str
    commit: str
    revisions: list[str] = []
    whole: bool = False
    files: dict[str, FileRecord] = {}

    def means(self, revision: str) -> bool:
        """Whether this commit is the one a branch, tag, commit or beginning of a commit stands for."""
        return revision in self.revisions or (len(revision) >= 7 and self.commit.startswith(revision))


class ModelStore:
    """The folder of fetched models. Raises ModelError for what is damaged, with what to do."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def folder(self, repo: str, commit: str) -> Path:
        """Where a commit's files are. Its last part is what the model is called in beats and tables."""
        return self.root / f"{repo}@{commit[:SHORT]}"

    def path(self, record: Record, file: str) -> Path:
        """Where a file of a record is; for "" its folder."""
        return self.folder(record.repo, record.commit) / file

    def find(self, name: HubName) -> Path | None:
        """The checked file or folder of this name if it is here in full. Raises ModelError if it has been changed."""
        record = next((one for one in self.records(name.id) if one.means(name.revision)), None)
        if record is None:
            return None
        files = shards(name.file) if name.file else list(record.files)
        complete = record.whole if not name.file else set(files) <= record.files.keys()
        if not complete or not all(self.path(record, file).is_file() for file in files):
            return None
        for file in files:
            self.check(record, file)
        return self.path(record, name.file)

    def check(self, record: Record, file: str, *, fully: bool = False) -> None:
        """Raise ModelError unless a file is what came; `fully` reads it whatever its size and time say."""
        path, then = self.path(record, file), record.files[file]
        stat = path.stat()
        if not fully and (stat.st_size, stat.st_mtime_ns) == (then.bytes, then.mtime_ns):
            return
        now = sha256(path) if stat.st_size == then.bytes else f"{stat.st_size} bytes"
        if now != then.sha256:
            was = f"SHA-256 {then.sha256[:SHORT]}, {then.bytes} bytes"
            fix = "delete it and run `pilotfish models pull`, or name a version of your own by its path"
            raise ModelError(f"{path} is not what was fetched ({was}; now {now[:SHORT]}): {fix}")

    def records(self, repo: str = "*/*") -> list[Record]:
        """Every record, or a repository's."""
        return [read(path) for path in sorted(self.root.glob(f"{repo}@*.json"))]

    def record(self, repo: str, commit: str) -> Record:
        """The record of a commit, an empty one if nothing of it is here."""
        path = self._record_path(repo, commit)
        return read(path) if path.is_file() else Record(repo=repo, commit=commit)

    def save(self, record: Record) -> None:
        """Write a record in one step."""
        path = self._record_path(record.repo, record.commit)
        draft = path.with_suffix(".saving")
        draft.write_text(record.model_dump_json(indent=1) + "\n", encoding="utf-8")
        draft.replace(path)

    def point(self, record: Record, revision: str) -> None:
        """From now on `revision` means this commit, and no other of its repository."""
        for other in self.records(record.repo):
            if other.commit != record.commit and revision in other.revisions:
                other.revisions.remove(revision)
                self.save(other)
        if revision not in (*record.revisions, record.commit):
            record.revisions.append(revision)
        self.save(record)

    @contextmanager
    def locked(self, repo: str) -> Iterator[None]:
        """One process at a time fetches from a repository; the others wait, and find it here."""
        path = self.root / f"{repo}.lock"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                log.info("waiting for another process that fetches from %s", repo)
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _record_path(self, repo: str, commit: str) -> Path:
        folder = self.folder(repo, commit)
        return folder.with_name(f"{folder.name}.json")


def read(path: Path) -> Record:
    """A record from its file. Raises ModelError."""
    try:
        return Record.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, ValidationError) as error:
        why = str(error).splitlines()[0]
        raise ModelError(f"the record {path} cannot be read ({why}): delete it and pull the model again") from None


def sha256(path: Path) -> str:
    """SHA-256 of a whole file, hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
