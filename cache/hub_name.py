"""Names of models on a hub: `hf://org/repo/file.gguf@revision` is a file, `hf://org/repo@revision` a folder.

A revision is a branch, a tag or a commit; without one it is `main`. Pure: knows no network and no disk.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import PurePosixPath

from pilotfish.protocol.errors import ModelError

SCHEME = "hf://"
_PART = r"[A-Za-z0-9_-][A-Za-z0-9._-]*"
_NAME = re.compile(rf"hf://(?P<org>{_PART})/(?P<repo>{_PART})(?:/(?P<file>[^@]+))?(?:@(?P<revision>[^@\s]+))?")
_SHARD = re.compile(r"-00001-of-(\d{5})\.gguf$")
#: what vLLM reads of a repository: weights that are not pickles, configs, tokenizers; nothing below a folder
FOLDER_FILES = ("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "LICENSE*")
NOT_OF_FOLDER = ("consolidated*",)  # a second copy of the weights


@dataclass(frozen=True, slots=True)
class HubName:
    """One file of a repository, or with an empty `file` the safetensors folder that the repository is."""

    org: str
    repo: str
    file: str = ""
    revision: str = "main"

    def __str__(self) -> str:
        file = f"/{self.file}" if self.file else ""
        return f"{SCHEME}{self.id}{file}" + (f"@{self.revision}" if self.revision != "main" else "")

    @property
    def id(self) -> str:
        """As the hub writes it: "org/repo"."""
        return f"{self.org}/{self.repo}"

    def wanted(self, there: list[str]) -> list[str]:
        """The files of this name among those `there`, weights last; a split GGUF is all its parts."""
        if self.file:
            return [name for name in shards(self.file) if name in there]
        top = [name for name in there if "/" not in name and any(fnmatch(name, kind) for kind in FOLDER_FILES)]
        top = [name for name in top if not any(fnmatch(name, kind) for kind in NOT_OF_FOLDER)]
        return sorted(top, key=lambda name: (name.endswith(".safetensors"), name))


def is_hub_name(text: str) -> bool:
    """Whether this names something on a hub, well or badly, rather than a path."""
    return text.startswith(SCHEME)


def hub_name(text: str) -> HubName:
    """Read `hf://…`. Raises ModelError with the form it should have."""
    found = _NAME.fullmatch(text)
    name = HubName(**{key: part for key, part in found.groupdict().items() if part}) if found else None
    if name is None or not _inside(name.file) or not _inside(name.revision):
        form = "hf://ORG/REPO/FILE.gguf@REVISION, or hf://ORG/REPO@REVISION for a folder of safetensors"
        raise ModelError(f"{text} names no model on a hub: write {form}")
    return name


def _inside(path: str) -> bool:
    return ".." not in PurePosixPath(path).parts and not path.startswith("/")


def shards(file: str) -> list[str]:
    """All files of a GGUF that may be split: `x-00001-of-00002.gguf` is the first of two."""
    if not (found := _SHARD.search(file)):
        return [file]
    total = found[1]
    return [f"{file[: found.start()]}-{part:05}-of-{total}.gguf" for part in range(1, int(total) + 1)]
