"""Fetch models from a Hugging Face hub: what a name stands for, then file by file, each resumed where it broke off.

huggingface_hub speaks to the hub, with its settings (HF_ENDPOINT, HF_TOKEN); its own cache throws a partial file away
when the process ends, so files and their checks are ours (`model_store.py`). Files that its cache has are taken from
there. Raises HubError with what to do, HubUnreachable without a network, ModelError for a full disk.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shutil
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING

from pilotfish.cache.hub_errors import told
from pilotfish.cache.hub_name import HubName, hub_name, is_hub_name, shards
from pilotfish.cache.model_store import FileRecord, ModelStore, Record
from pilotfish.protocol.errors import HubError, ModelError, SettingsError

if TYPE_CHECKING:
    from huggingface_hub import HfApi

log = logging.getLogger(__name__)
SPARE_BYTES = 64 << 20  # a disk filled to the last byte helps nobody
LISTED = 4  # files named in an error


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file as the hub announces it: big ones with their SHA-256, small ones with git's SHA-1 of the blob."""

    name: str
    bytes: int
    sha256: str = ""
    git_sha1: str = ""

    def is_in(self, path: Path, record: FileRecord) -> bool:
        """Whether the file at `path`, read as `record`, is this one."""
        if record.bytes != self.bytes or self.sha256:
            return (record.bytes, record.sha256) == (self.bytes, self.sha256)
        blob = b"blob %d\0" % self.bytes + path.read_bytes()
        return not self.git_sha1 or hashlib.sha1(blob, usedforsecurity=False).hexdigest() == self.git_sha1


def model_path(named: str, models: Path, *, offline: bool = False) -> Path:
    """Where a model named by path or by `hf://` is. What is not in the folder `models` yet is fetched into it."""
    if not is_hub_name(named):
        return Path(named)
    name, store = hub_name(named), ModelStore(models)
    if found := store.find(name):
        return found
    if offline:
        raise HubError(
            f"{name} is not here in full and --offline forbids to fetch it: run `pilotfish models pull {name}` where "
            f"there is a network, and bring {models} here"
        )
    return fetch(name, store)


def fetch(name: HubName, store: ModelStore) -> Path:
    """Ask the hub what `name` means today, fetch what is missing, and return the file or folder."""
    api = _api()
    with told(name, api.endpoint), store.locked(name.id):
        commit, there = ask(api, name)
        wanted = _wanted(name, there)
        record = store.record(name.id, commit)
        _check_room(store, record, wanted)
        for file in wanted:
            _bring(api, store, record, file)
        record.whole = record.whole or not name.file
        store.point(record, name.revision)
    return store.path(record, name.file)


def ask(api: HfApi, name: HubName) -> tuple[str, list[RemoteFile]]:
    """(commit, files) of the revision named."""
    info = api.model_info(name.id, revision=name.revision, files_metadata=True, timeout=10.0)
    if not re.fullmatch("[0-9a-f]{40}", info.sha or ""):  # it becomes part of a path
        raise HubError(f"{api.endpoint} names no commit for {name}: is HF_ENDPOINT a model hub?")
    files = [
        RemoteFile(one.rfilename, one.size or 0, one.lfs.sha256 if one.lfs else "", one.blob_id or "")
        for one in info.siblings or ()
    ]
    return str(info.sha), files


def _wanted(name: HubName, there: list[RemoteFile]) -> list[RemoteFile]:
    files = {file.name: file for file in there}
    wanted = name.wanted(list(files))
    if name.file and wanted != shards(name.file):
        near = get_close_matches(name.file, files, n=LISTED, cutoff=0.3) or list(files)[:LISTED]
        raise HubError(f"{name.id} has no file {name.file} at {name.revision}: it has {', '.join(near)}")
    if not name.file and not any(one.endswith(".safetensors") for one in wanted):
        raise HubError(
            f"{name.id} has no safetensors at {name.revision}: name one of its files, as in {name}/FILE.gguf, "
            f"or another repository"
        )
    return [files[one] for one in wanted]


def _check_room(store: ModelStore, record: Record, wanted: list[RemoteFile]) -> None:
    """Before the first byte: does what is missing fit?"""
    paths = {file: store.path(record, file.name) for file in wanted if file.name not in record.files}
    missing = sum(file.bytes - _size(_part(path)) for file, path in paths.items())
    free = shutil.disk_usage(store.root).free
    if missing + SPARE_BYTES > free and missing:
        raise ModelError(
            f"{record.repo} needs {_gb(missing)} more and {store.root} has {_gb(free)} free: "
            f"make room, or set --cache-dir to a larger disk"
        )


def _bring(api: HfApi, store: ModelStore, record: Record, file: RemoteFile) -> None:
    """One file: here already, or in huggingface_hub's cache, or over the network; checked, then recorded."""
    path = store.path(record, file.name)
    if file.name in record.files and path.is_file():
        store.check(record, file.name)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    part = _part(path)
    if path.is_file():  # its record is gone
        path.replace(part)
    if not _take_from_cache(record, file, part):
        _download(api, record, file, part)
    came = FileRecord.of(part)
    if not file.is_in(part, came):
        part.unlink()
        raise HubError(f"{file.name} of {record.repo} came damaged, and was thrown away: pull it again")
    part.replace(path)
    record.files[file.name] = came
    store.save(record)


def _download(api: HfApi, record: Record, file: RemoteFile, part: Path) -> None:
    """Append to what is there of the file."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]  # documented, but not in __all__

    have = _size(part)
    if have > file.bytes:
        part.unlink()
        have = 0
    log.info("fetching %s of %s, %s%s", file.name, record.repo, _gb(file.bytes), f", {_gb(have)} are here" * bool(have))
    url = hf_hub_url(record.repo, file.name, revision=record.commit, endpoint=api.endpoint)
    with part.open("ab") as out:
        http_get(
            url, out, resume_size=have, headers=build_hf_headers(), expected_size=file.bytes,
            displayed_filename=Path(file.name).name,
        )  # fmt: skip


def _take_from_cache(record: Record, file: RemoteFile, part: Path) -> bool:
    """A file that huggingface_hub (transformers, vLLM) has fetched before: linked, or copied to another disk."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(record.repo, file.name, revision=record.commit)
    if not isinstance(found, str):
        return False
    source = os.path.realpath(found)
    part.unlink(missing_ok=True)
    try:
        os.link(source, part)
    except OSError:
        shutil.copyfile(source, part)
    return True


def _api() -> HfApi:
    """The hub that HF_ENDPOINT names, read now and not when the library was imported."""
    try:
        from huggingface_hub import HfApi
    except ImportError:
        raise SettingsError("hf:// names need huggingface_hub: pip install 'pilotfish[edge]'") from None
    return HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None)


def _part(path: Path) -> Path:
    return path.with_name(path.name + ".part")


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _gb(n_bytes: int) -> str:
    return f"{n_bytes / 1e9:.2f} GB" if n_bytes >= 1e7 else f"{n_bytes / 1e3:.0f} kB"
