"""One job in a worker's hands: what its stream entry says, and what becomes of it when it is given up.

Reading an entry trusts nothing in it but where it stood: the tenant is the stream's, and a name that could reach other
keys is no agent. Knows the fields of an entry; neither Redis nor messages.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Final

from pilotfish.protocol import keys

DEAD_LETTER_BYTES: Final = 65_536  # of a payload, for people; anyone may send a megabyte of nothing


@dataclass(frozen=True, slots=True)
class Delivery:
    """One job as it was picked up; `deliveries` counts this one, also those before it was passed on.

    Of a job that a peer passed on, `first_id` is the id it came with, `cached_tokens` what its new worker should have
    (-1: nobody knows) and `queued_tokens` what was reserved there. `stolen` from a peer that lives.
    """

    stream: str
    entry_id: str
    tenant: str
    agent: str
    payload: bytes
    deliveries: int = 1
    first_id: str = ""
    hops: int = 0
    cached_tokens: int = -1
    queued_tokens: int = 0
    stolen: bool = False

    @property
    def sent_ms(self) -> int:
        """When it was published, on Redis' clock."""
        return int((self.first_id or self.entry_id).partition("-")[0])


def read(stream: str, entry_id: bytes, fields: dict[bytes, bytes], deliveries: int = 1) -> Delivery:
    """An entry of an ingress stream, or of one that peers pass jobs on by."""
    agent = _name(fields.get(keys.FIELD_AGENT.encode(), b""))
    payload = fields.get(keys.FIELD_MESSAGE.encode(), b"")
    _, _, kind, owner, *_ = stream.split(":")
    delivery = Delivery(stream, entry_id.decode(), owner, agent, payload, deliveries)
    return _passed_on(delivery, fields) if kind == "fwd" else delivery


def _passed_on(delivery: Delivery, fields: dict[bytes, bytes]) -> Delivery:
    """With what the peer said about it; only workers write that stream, so it is as it should be."""

    def said(field: str) -> int:
        return int(fields[field.encode()])

    return replace(
        delivery,
        tenant=fields[keys.FIELD_TENANT.encode()].decode(),
        deliveries=said(keys.FIELD_DELIVERIES) + delivery.deliveries - 1,
        first_id=fields[keys.FIELD_FIRST.encode()].decode(),
        hops=said(keys.FIELD_HOPS),
        cached_tokens=said(keys.FIELD_CACHED),
        queued_tokens=said(keys.FIELD_QUEUED),
    )


def _name(raw: bytes) -> str:
    """An agent's name if it is one; a client may write anything there, and it becomes part of a key."""
    text = raw.decode("ascii", "replace")
    return text if keys.NAME.fullmatch(text) else ""


def passing_on(delivery: Delivery, cached_tokens: int, queued_tokens: int) -> list[Any]:
    """Fields and values that a job passed on carries besides its payload."""
    fields = {
        keys.FIELD_TENANT: delivery.tenant,
        keys.FIELD_AGENT: delivery.agent,
        keys.FIELD_FIRST: delivery.first_id or delivery.entry_id,
        keys.FIELD_DELIVERIES: delivery.deliveries,
        keys.FIELD_HOPS: delivery.hops + 1,
        keys.FIELD_CACHED: cached_tokens,
        keys.FIELD_QUEUED: queued_tokens,
    }
    return [part for pair in fields.items() for part in pair]


def dead_letter(delivery: Delivery, why: str) -> tuple[Any, ...]:
    """Fields and values of the copy of a job given up."""
    payload = delivery.payload[:DEAD_LETTER_BYTES]
    return (keys.FIELD_AGENT, delivery.agent, keys.FIELD_MESSAGE, payload, "stream", delivery.stream, "why", why)
