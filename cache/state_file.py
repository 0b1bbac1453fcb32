"""One saved KV state as bytes: a msgpack header, its digest, the state. A file on disk is one, an export is many.

    "PFSTATE" · "1", the form · u32 length of the header · header · blake2b of the header · the state of llama.cpp

The header says of which model build and of which ids the state is, how long it is, and its digest. Everything is
checked before a byte reaches llama.cpp; lengths are checked before memory is taken. A digest finds damage, not malice:
import only what an agent you trust has exported.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from hashlib import blake2b
from typing import BinaryIO

import msgpack
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pilotfish.cache.model_build import ModelBuild
from pilotfish.cache.prefix_map import ID_BYTES
from pilotfish.cache.state_memory import allocate
from pilotfish.protocol.codec import unpack_bounded
from pilotfish.protocol.errors import BuildMismatch, InvalidMessage, StateError
from pilotfish.protocol.messages import MAX_CONTEXT

MAGIC, FORM = b"PFSTATE", b"1"
HEADER_MAX = MAX_CONTEXT * ID_BYTES + 4096
_SUM = 16  # bytes of a digest


class Header(BaseModel):
    """What a state is of. `key` is its ids, packed; `model` a name for people."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    build: ModelBuild
    model: str
    key: bytes = Field(min_length=ID_BYTES)
    n_bytes: int = Field(ge=1)
    digest: bytes

    @property
    def tokens(self) -> int:
        """How many ids."""
        return len(self.key) // ID_BYTES


def describe(build: ModelBuild, model: str, key: bytes, state: memoryview) -> Header:
    """The header of a state."""
    return Header(build=build, model=model, key=key, n_bytes=state.nbytes, digest=_sum(state))


def write(file: BinaryIO, header: Header, state: memoryview) -> None:
    """Append one state. Raises OSError, as for a full disk."""
    head = msgpack.packb(header.model_dump())
    file.write(MAGIC + FORM + len(head).to_bytes(4, "little") + head + _sum(head))
    file.write(state)


def size(header: Header) -> int:
    """Bytes that `write` writes."""
    return len(MAGIC + FORM) + 4 + len(msgpack.packb(header.model_dump())) + _SUM + header.n_bytes


def read_header(file: BinaryIO) -> Header:
    """The next state's header; the file then stands at the state itself.

    Raises StateError if it is damaged, BuildMismatch if another version of pilotfish wrote it.
    """
    if _exactly(file, len(MAGIC)) != MAGIC:
        raise StateError("it does not begin as a saved KV state does")
    if _exactly(file, 1) != FORM:
        raise BuildMismatch("another version of pilotfish saved it")
    length = int.from_bytes(_exactly(file, 4), "little")
    if not 0 < length <= HEADER_MAX:
        raise StateError("its header is damaged")
    head = _exactly(file, length)
    if _exactly(file, _SUM) != _sum(head):
        raise StateError("its header is damaged")
    try:
        header = Header.model_validate(unpack_bounded(head, HEADER_MAX))
    except (InvalidMessage, ValidationError):
        raise BuildMismatch("another version of pilotfish saved it") from None
    if header.n_bytes > _left(file):
        raise StateError("it is cut short")
    return header


def read_state(file: BinaryIO, header: Header) -> memoryview:
    """The state behind a header. Raises StateError if it is damaged."""
    state = allocate(header.n_bytes)
    at = 0
    while at < header.n_bytes and (n := file.readinto(state[at:])):  # type: ignore[attr-defined]  # buffered or raw
        at += n
    if at < header.n_bytes:
        raise StateError("it is cut short")
    if _sum(state) != header.digest:
        raise StateError("its state is damaged")
    return state


def headers(file: BinaryIO) -> Iterator[Header]:
    """The header of each state, to the end of the file; whoever takes one may read its state before the next."""
    while _left(file):
        header = read_header(file)
        state_ends = file.tell() + header.n_bytes
        yield header
        file.seek(state_ends)


def _left(file: BinaryIO) -> int:
    return os.fstat(file.fileno()).st_size - file.tell()


def _exactly(file: BinaryIO, n: int) -> bytes:
    data = file.read(n)
    if len(data) < n:
        raise StateError("it is cut short")
    return data


def _sum(data: bytes | memoryview) -> bytes:
    return blake2b(data, digest_size=_SUM).digest()
