"""Message <-> msgpack. Limits are checked before decoding, and every fault is one `InvalidMessage`.

On the wire a message is a msgpack map: its fields, plus "v", the wire version. A payload of an older version is
upgraded step by step (`UPGRADES`), a newer one is refused. This module knows nothing of Redis.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Annotated, Any, TypeVar, Union

import msgpack
from pydantic import Field, TypeAdapter, ValidationError

from pilotfish.protocol import messages
from pilotfish.protocol.errors import InvalidMessage

WIRE_VERSION = 1
MAX_BYTES = 1_000_000

#: version -> function that turns a map of that version into one of the next
UPGRADES: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {}

M = TypeVar("M")


def encode(message: messages.Message) -> bytes:
    """One message as msgpack bytes; defaults are left out, so that old readers meet few surprises.

    Raises InvalidMessage if the result would exceed MAX_BYTES, the limit of every reader.
    """
    body = message.model_dump(exclude_defaults=True)
    body["v"] = WIRE_VERSION
    if "type" in type(message).model_fields:
        body["type"] = type(message).model_fields["type"].default
    data: bytes = msgpack.packb(body)
    if len(data) > MAX_BYTES:
        raise InvalidMessage(f"a {len(data)}-byte message exceeds the limit of {MAX_BYTES}: send a shorter prompt")
    return data


def unpack(data: bytes) -> dict[str, Any]:
    """Bytes to a current-version map, or InvalidMessage. Depth, sizes and types are bounded by msgpack's own limits."""
    if len(data) > MAX_BYTES:
        raise InvalidMessage(f"a {len(data)}-byte message exceeds the limit of {MAX_BYTES} bytes")
    try:
        body = msgpack.unpackb(data, raw=False, strict_map_key=True, max_map_len=64, max_array_len=MAX_BYTES)
    except Exception as error:  # msgpack raises five kinds, among them ValueError and RecursionError
        raise InvalidMessage(f"not msgpack: {type(error).__name__}: {error}"[:300]) from None
    if not isinstance(body, dict):
        raise InvalidMessage(f"a message is a map, this is {type(body).__name__}")
    return _upgrade(body)


def _upgrade(body: dict[str, Any]) -> dict[str, Any]:
    version = body.pop("v", None)
    if type(version) is not int or version > WIRE_VERSION:
        raise InvalidMessage(f"wire version {str(version)[:40]!r} is not {WIRE_VERSION} or older: upgrade this side")
    while version < WIRE_VERSION:
        if version not in UPGRADES:
            raise InvalidMessage(f"wire version {version} is no longer read: upgrade the sender")
        try:
            body = UPGRADES[version](body)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InvalidMessage(f"a version {version} message cannot be upgraded: {error!r}"[:300]) from None
        version += 1
    return body


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    members = getattr(kind, "__args__", ())
    if len(members) > 1:
        return TypeAdapter(Annotated[Union[members], Field(discriminator="type")])  # noqa: UP007
    return TypeAdapter(kind)


def decode(data: bytes, kind: type[M] | Any) -> M:
    """Bytes to a message of `kind`: a class, or a union of the messages page. Raises InvalidMessage and nothing else."""
    body = unpack(data)
    try:
        message: M = _adapter(kind).validate_python(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(map(str, first["loc"])) or "message"
        raise InvalidMessage(f"{where}: {first['msg']}"[:300]) from None
    return message
