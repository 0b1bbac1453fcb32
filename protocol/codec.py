"""Message <-> msgpack. Limits are checked before decoding, and every fault is one `InvalidMessage`.

On the wire a message is a msgpack map: its fields, plus "v", the wire version. A payload of an older version is
upgraded step by step (`UPGRADES`), a newer one is refused. Reading costs time and memory in proportion to the bytes
that came, whatever they claim. This module knows nothing of Redis.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Annotated, Any, Union

import msgpack
from pydantic import Field, TypeAdapter, ValidationError

from pilotfish.protocol import messages
from pilotfish.protocol.errors import InvalidMessage

WIRE_VERSION = 1
MAX_BYTES = 1_000_000
MAX_FIELDS = 64
PADDING = "pad"  # first field of a padded message: zeros, which every reader drops
BUCKET_BYTES = 1024  # padded messages are this long, or twice, four times ... as long

#: version -> function that turns a map of that version into one of the next
UPGRADES: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {}


# --- writing -------------------------------------------------------------------------------------------------


def encode(message: messages.Message, *, padded: bool = False) -> bytes:
    """One message as msgpack bytes; defaults are left out, so that old readers meet few surprises.

    With `padded` its size is BUCKET_BYTES times a power of two (or MAX_BYTES), and tells nothing else.
    Raises InvalidMessage if the result would exceed MAX_BYTES, the limit of every reader.
    """
    body = _unlike_default(message)
    body["v"] = WIRE_VERSION
    if (kind := getattr(message, "type", None)) is not None:
        body["type"] = kind
    data: bytes = msgpack.packb(body)
    if len(data) > MAX_BYTES:
        raise InvalidMessage(f"a {len(data)}-byte message exceeds the limit of {MAX_BYTES}: send a shorter prompt")
    return _pad(data, len(body)) if padded else data


def _pad(data: bytes, fields: int) -> bytes:
    """The same map with one more field in front. Its length takes four bytes, whatever it is: every size can be hit."""
    header: bytes = msgpack.Packer().pack_map_header(fields + 1) + msgpack.packb(PADDING) + b"\xc6"
    rest = data[len(msgpack.Packer().pack_map_header(fields)) :]
    least = len(header) + 4 + len(rest)
    size = min(MAX_BYTES, BUCKET_BYTES << max(0, ((least - 1) // BUCKET_BYTES).bit_length()))
    if least > size:
        return data  # within a few bytes of the limit: nothing larger may be sent
    return header + (size - least).to_bytes(4, "big") + bytes(size - least) + rest


def is_padded(data: bytes) -> bool:
    """Whether `encode` padded these bytes."""
    return bytes(msgpack.packb(PADDING)) in data[:8]


def _unlike_default(message: messages.Message) -> dict[str, Any]:
    """What `model_dump(exclude_defaults=True)` says, in a third of its time: the arrays are not copied item by item."""
    body: dict[str, Any] = {}
    for name, default in _defaults(type(message)):
        value = getattr(message, name)
        if value != default:
            body[name] = _unlike_default(value) if isinstance(value, messages.Message) else value
    return body


@cache
def _defaults(kind: type[messages.Message]) -> list[tuple[str, Any]]:
    return [(name, field.default) for name, field in kind.model_fields.items()]


# --- reading -------------------------------------------------------------------------------------------------


def decode(data: bytes, kind: Any) -> Any:
    """Bytes to a message of `kind`: a class, or a union of the messages page. Raises InvalidMessage and nothing else.

    Types are those of the page: the wire has its own integers, floats, texts and bytes, so nothing is converted.
    """
    body = unpack(data)
    try:
        return _adapter(kind).validate_python(body, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(str(part)[:80] for part in first["loc"]) or "message"
        raise InvalidMessage(f"{where}: {first['msg']}"[:300]) from None


def unpack(data: bytes) -> dict[str, Any]:
    """Bytes to a map of the current version, arrays as tuples. Raises InvalidMessage for anything else."""
    body = unpack_bounded(data, MAX_BYTES)
    if not isinstance(body, dict):
        raise InvalidMessage(f"a message is a map, this is {type(body).__name__}")
    body.pop(PADDING, None)
    return _upgrade(body)


def unpack_bounded(data: bytes, max_bytes: int) -> Any:
    """One msgpack value that fills `data` exactly. Raises InvalidMessage and nothing else.

    The walk before unpacking builds nothing. It is what makes lengths honest: five bytes may claim four billion
    items, and nested claims are allocated one inside the other before the first of them turns out to be empty.
    """
    if len(data) > max_bytes:
        raise InvalidMessage(f"a {len(data)}-byte message exceeds the limit of {max_bytes} bytes")
    try:
        walk = msgpack.Unpacker(max_buffer_size=max(1, len(data)), read_size=max(1, len(data)))
        walk.feed(data)
        walk.skip()
        return msgpack.unpackb(data, raw=False, use_list=False, max_map_len=MAX_FIELDS)
    except Exception as error:  # msgpack raises six kinds, among them ValueError and RecursionError
        raise InvalidMessage(f"not msgpack: {type(error).__name__}: {error}"[:300]) from None


def _upgrade(body: dict[str, Any]) -> dict[str, Any]:
    version = body.pop("v", None)
    if type(version) is not int or version > WIRE_VERSION:
        raise InvalidMessage(f"wire version {str(version)[:40]!r} is not {WIRE_VERSION} or older: upgrade this side")
    while version < WIRE_VERSION:
        if version not in UPGRADES:
            raise InvalidMessage(f"wire version {version} is no longer read: upgrade the sender")
        try:
            body = UPGRADES[version](body)
        except Exception as error:  # an upgrade reads a map that nothing has checked yet
            raise InvalidMessage(f"a version {version} message cannot be upgraded: {error!r}"[:300]) from None
        version += 1
    return body


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    members = getattr(kind, "__args__", ())
    if len(members) > 1:
        kind = Annotated[Union[members], Field(discriminator="type")]  # noqa: UP007  members are known at run time
    return TypeAdapter(kind)
