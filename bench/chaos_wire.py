"""An older form of the wire for half of a fleet: version 0, in which a message's `session` was called `s`.

There is no older version yet, so that what a release will do (read two, write one of them) is done here by hand: the
upgrade goes where the product's own will stand, `codec.UPGRADES`.
"""

from __future__ import annotations

from typing import Any

import msgpack

from pilotfish.protocol import answers, broker, codec, shedding, shell
from pilotfish.protocol.messages import Message

OLDER = 0
WRITERS = (answers, broker, shedding, shell)  # modules that encode messages


def read_both() -> None:
    """This process reads version 0 as well."""
    codec.UPGRADES[OLDER] = upgrade


def upgrade(body: dict[str, Any]) -> dict[str, Any]:
    """Version 0 to 1."""
    return {"session" if name == "s" else name: value for name, value in body.items()}


def downgraded(message: Message, *, padded: bool = False) -> bytes:
    """A message in the form of version 0, which knew no padding."""
    body = msgpack.unpackb(codec.encode(message), strict_map_key=False)
    body["v"] = OLDER
    if "session" in body:
        body["s"] = body.pop("session")
    packed: bytes = msgpack.packb(body)
    return packed


def write_older() -> None:
    """This process writes version 0 only."""
    for module in WRITERS:
        module.encode = downgraded  # type: ignore[attr-defined]
