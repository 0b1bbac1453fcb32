"""llama.cpp's shared library, loaded once, its log and its threads tamed; and a look at a model file without it.

The only module that imports llama_cpp, and only `llama_context.py` calls into it.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
from functools import lru_cache
from pathlib import Path
from typing import Any

from pilotfish.cache.hub_name import shards
from pilotfish.protocol.errors import ModelError

_SMALL_FILE = 1 << 30
_log = logging.getLogger(__name__)
last_error: list[str] = []  # what llama.cpp said last at level ERROR


@lru_cache(maxsize=1)
def library() -> Any:
    """llama_cpp's C API, with its log going to ours (level DEBUG) instead of stderr."""
    try:
        library = _import_passive()
    except ImportError as error:
        raise ModelError("llama.cpp is not installed; run `pip install pilotfish[edge]`.") from error

    @library.llama_log_callback  # type: ignore[untyped-decorator, unused-ignore]
    def on_log(level: int, text: bytes, _data: object) -> None:
        line = text.decode("utf-8", "replace").strip()
        if level == 4:  # GGML_LOG_LEVEL_ERROR
            last_error[:] = [line]
        _log.debug("%s", line)

    library.pilotfish_log = on_log  # the C side keeps only a pointer
    library.llama_log_set(on_log, ctypes.c_void_p(0))
    library.llama_backend_init()
    return library


def _import_passive() -> Any:
    """llama_cpp with OpenMP threads that sleep while they wait, unless the environment says otherwise.

    Spinning ones starve each other when cores are short: 1,376 ms a pass against 2.3 with 2 threads on 2 busy cores.
    """
    told = "OMP_WAIT_POLICY" in os.environ or "GOMP_SPINCOUNT" in os.environ
    if not told:
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # read once, when the library is loaded
    try:
        import llama_cpp.llama_cpp as library
        from llama_cpp import _utils
    finally:
        if not told:
            del os.environ["OMP_WAIT_POLICY"]
    for file in (_utils.outnull_file, _utils.errnull_file):  # opened at import, for the `Llama` class alone
        file.close()
    return library


def library_version() -> str:
    """The version of llama-cpp-python, which pins the llama.cpp inside it."""
    from importlib.metadata import version

    return version("llama-cpp-python")


def reason() -> str:
    """What llama.cpp said of the last failure, in brackets, to end a sentence with."""
    return f" ({last_error[0]})" if last_error else ""


def check_magic(path: Path) -> None:
    """Raise ModelError unless the file is there, readable and a GGUF."""
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except FileNotFoundError:
        raise ModelError(f"There is no model file at {path}; check the path.") from None
    except OSError as error:
        raise ModelError(f"The model file {path} cannot be read: {error.strerror}.") from error
    if magic != b"GGUF":
        raise ModelError(f"{path} is not a GGUF file; convert the model to GGUF, or fetch one.")


def model_digest(path: Path) -> str:
    """sha256 of a GGUF file, or of all parts of a split one. Raises ModelError for what is no GGUF."""
    digests = []
    for part in (path.with_name(name) for name in shards(path.name)):
        check_magic(part)
        stat = part.stat()
        digests.append(_file_digest(part, stat.st_size, stat.st_mtime_ns))
    return digests[0] if len(digests) == 1 else hashlib.sha256("\n".join(digests).encode()).hexdigest()


@lru_cache(maxsize=32)
def _file_digest(path: Path, size: int, mtime_ns: int) -> str:
    """Of the size and samples where it is larger than 1 GiB. Size and time have a changed file read again."""
    digest = hashlib.sha256(f"{size}\n".encode())
    with path.open("rb") as file:
        if size <= _SMALL_FILE:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
        else:  # the header and 128 samples of the weights: 80 MB read instead of 14 GB
            digest.update(file.read(16 << 20))
            for i in range(128):
                file.seek((size - (1 << 19)) * i // 127)
                digest.update(file.read(1 << 19))
    return digest.hexdigest()
