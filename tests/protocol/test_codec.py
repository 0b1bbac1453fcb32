"""Bytes from anyone become a message that could have been sent, or InvalidMessage: nothing else, and never slowly."""

from __future__ import annotations

import time
import tracemalloc
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pilotfish.protocol import codec
from pilotfish.protocol import messages as m
from pilotfish.protocol.codec import MAX_BYTES, decode, encode
from pilotfish.protocol.errors import InvalidMessage
from pilotfish.protocol.history import History

KINDS = (m.ToWorker, m.ToEdge, m.ToAgent, m.ToShell)
SESSION = "0" * 32

JOB = m.VerifyJob(
    agent="a", boot="b", session=SESSION, epoch=1, round=2, base=6, digest=b"d" * 16, offset=2, ids=(5, 6, 7, 8),
    draft=(1, 2, 3), sampling=m.Sampling(temperature=0.7, top_p=0.9, seed=7), stop_ids=(2,),
)  # fmt: skip
SEEDS: list[tuple[m.Message, Any]] = [
    (JOB, m.ToWorker),
    (m.Cancel(agent="a", boot="b", session=SESSION), m.ToWorker),
    (
        m.Verdict(boot="b", session=SESSION, epoch=1, round=2, base=6, digest=b"d" * 16, draws=(1, 9), accepted=1,
                  worker="w", credit=3, queue_ms=0.25, engine_ms=4.5, rows=4, steps=1, last=False),
        m.ToEdge,
    ),
    (m.Refusal(boot="b", session=SESSION, epoch=1, round=2, code="stale", sentence="no", worker="w"), m.ToEdge),
    (m.Prompt(request=SESSION, text="hello", raw=True, sampling=m.Sampling(temperature=1.0)), m.ToAgent),
    (m.Accepted(request=SESSION, agent="a", prompt_tokens=3, seed=1), m.ToShell),
    (m.Text(request=SESSION, ids=(1, 2), pieces=("a", "b"), origins=("local", "accepted")), m.ToShell),
    (m.Finished(request=SESSION, reason="stop", summary=m.Summary(tokens=2, total_ms=1.5)), m.ToShell),
    (m.Failed(request=SESSION, code="deadline", sentence="too late"), m.ToShell),
]  # fmt: skip


def wire(**fields: Any) -> bytes:
    return bytes(msgpack.packb({"v": codec.WIRE_VERSION, **fields}))


def body_of(message: m.Message) -> dict[str, Any]:
    body: dict[str, Any] = msgpack.unpackb(encode(message))
    return body


# --- both ways -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("message", "kind"), SEEDS)
def test_what_is_encoded_decodes_to_the_same(message: m.Message, kind: Any) -> None:
    assert decode(encode(message), kind) == message


@pytest.mark.parametrize(("message", "kind"), SEEDS)
def test_the_wire_names_its_version_and_type_and_leaves_defaults_out(message: m.Message, kind: Any) -> None:
    body = body_of(message)
    assert (body.pop("v"), body["type"]) == (codec.WIRE_VERSION, message.type)  # type: ignore[attr-defined]
    plain = msgpack.unpackb(msgpack.packb(message.model_dump(exclude_defaults=True)))
    assert body == {**plain, "type": body["type"]}


@pytest.mark.parametrize(("message", "kind"), SEEDS)
def test_each_field_alone_may_be_left_out_where_it_has_a_default(message: m.Message, kind: Any) -> None:
    for name, field in type(message).model_fields.items():
        body = body_of(message)
        body.pop(name, None)
        data = msgpack.packb(body)
        if field.is_required() or (name == "type" and kind is not m.Prompt):
            with pytest.raises(InvalidMessage):
                decode(data, kind)
        else:
            assert getattr(decode(data, kind), name) == field.default


@given(
    st.builds(
        m.Sampling,
        temperature=st.floats(0, 100),
        top_k=st.integers(0, m.MAX_TOKEN_ID),
        top_p=st.floats(0, 1, exclude_min=True),
        min_p=st.floats(0, 1),
        seed=st.integers(0, m.SEED_MAX),
    )
)
def test_both_sides_of_the_wire_compute_one_digest(sampling: m.Sampling) -> None:
    arrived: m.Sampling = decode(encode(JOB.model_copy(update={"sampling": sampling})), m.ToWorker).sampling
    assert arrived == sampling
    assert History("t", arrived, (1, 2)).digest(2) == History("t", sampling, (1, 2)).digest(2)


# --- faults, one by one --------------------------------------------------------------------------------------

FAULTS: dict[str, bytes] = {
    "nothing": b"",
    "text": b"hello",
    "no map": msgpack.packb([1, 2]),
    "no version": msgpack.packb({"type": "cancel", "agent": "a", "boot": "b", "session": SESSION}),
    "a version that is a boolean": wire(v=True, type="cancel", agent="a", boot="b", session=SESSION),
    "a version that is a float": wire(v=1.0, type="cancel", agent="a", boot="b", session=SESSION),
    "a negative version": wire(v=-1, type="cancel", agent="a", boot="b", session=SESSION),
    "a newer version": wire(v=2, type="cancel", agent="a", boot="b", session=SESSION),
    "no type": wire(agent="a", boot="b", session=SESSION),
    "a type of another direction": wire(type="verdict", agent="a", boot="b", session=SESSION),
    "a type that cannot be hashed": wire(type=[1], agent="a", boot="b", session=SESSION),
    "an unknown field": wire(type="cancel", agent="a", boot="b", session=SESSION, surprise=1),
    "a number where text belongs": wire(type="cancel", agent=1, boot="b", session=SESSION),
    "bytes where text belongs": wire(type="cancel", agent=b"a", boot="b", session=SESSION),
    "a name with a colon": wire(type="cancel", agent="a:b", boot="b", session=SESSION),
    "a name that ends in a newline": wire(type="cancel", agent="a\n", boot="b", session=SESSION),
    "an upper-case session": wire(type="cancel", agent="a", boot="b", session="A" * 32),
    "invalid UTF-8": msgpack.packb({"v": 1, "type": "cancel", "agent": "a"}).replace(b"\xa1a", b"\xa1\xff"),
    "bytes after the end": encode(JOB) + b"\x00",
    "a key that is no text": msgpack.packb({"v": 1, 7: 7}),
    "a key inside that is no text": wire(**{**body_of(JOB), "sampling": {7: 1}}),
    "a key that is an array": b"\x81\x91\x01\x01",
    "an extension type": wire(type="cancel", agent=msgpack.ExtType(5, b"x"), boot="b", session=SESSION),
    "more fields than any message has": msgpack.packb({str(i): i for i in range(65)}),
    "more bytes than the limit": b"\xc0" * (MAX_BYTES + 1),
}

WRONG_VALUES: list[tuple[str, Any]] = [
    ("ids", [-1]), ("ids", [2**31]), ("ids", [True]), ("ids", ["1"]), ("ids", [1.0]), ("ids", "12"), ("ids", {"1": 1}),
    ("ids", msgpack.ExtType(1, b"1")), ("draft", [0] * 257), ("stop_ids", [0] * 33), ("epoch", -1),
    ("epoch", 2**53 + 1), ("epoch", "1"),
    ("round", 1.0), ("base", 0), ("base", 2**18 + 1), ("digest", b"d" * 15), ("digest", "d" * 16),
    ("offset", None), ("deadline_ms", 0), ("continue_tokens", 2**64 - 1), ("sampling", None), ("sampling", [0.7]),
    ("sampling", {"temperature": float("nan")}), ("sampling", {"temperature": float("inf")}),
    ("sampling", {"temperature": "0.7"}), ("sampling", {"top_p": 0.0}), ("sampling", {"seed": -1}),
    ("sampling", {"surprise": 1}),
]  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_no_message_is_an_invalid_message(fault: str) -> None:
    with pytest.raises(InvalidMessage) as caught:
        decode(FAULTS[fault], m.ToWorker)
    assert 0 < len(str(caught.value)) <= 300


@pytest.mark.parametrize(("name", "value"), WRONG_VALUES)
def test_a_value_out_of_range_or_of_another_type_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(InvalidMessage, match=name):
        decode(msgpack.packb({**body_of(JOB), name: value}), m.ToWorker)


def test_a_message_too_long_for_every_reader_is_not_written() -> None:
    with pytest.raises(InvalidMessage, match="shorter prompt"):
        encode(JOB.model_copy(update={"ids": (2**31 - 1,) * 250_000}))


# --- any bytes: tests/hostile/ has more, and shorter ways to the fields --------------------------------


@given(st.binary(max_size=200), st.sampled_from(KINDS))
def test_any_bytes_at_all_are_a_message_or_one_typed_error(data: bytes, kind: Any) -> None:
    with pytest.raises(InvalidMessage):
        decode(data, kind)


# --- bombs: small claims of large things, large payloads full of faults -----------------------------------------

DEEP = 500
BOMBS: dict[str, bytes] = {
    "an array of four billion": b"\x81\xa3ids\xdd\xff\xff\xff\xff",
    "a map of four billion": b"\xdf\xff\xff\xff\xff",
    "a text of four gigabytes": b"\x81\xa1a\xdb\xff\xff\xff\xff",
    "arrays of a million, each inside the other": b"\x81\xa1a" + b"\xdd\x00\x0f\x00\x00" * DEEP,
    "the same with a megabyte behind it": b"\x81\xa1a" + b"\xdd\x00\x0f\x00\x00" * DEEP + b"\xc0" * 900_000,
    "maps of a million, each inside the other": (b"\x81\xa1a" + b"\xdf\x00\x0f\x00\x00\xa1a" * DEEP),
    "a hundred thousand levels": b"\x81\xa1a" + b"\x91" * 100_000 + b"\xc0",
    "a thousand levels": b"\x81\xa1a" + b"\x91" * 1000 + b"\xc0",
    "half a million faults in one array": wire(type="verify", ids=[None] * 500_000),
    "half a million faults in another": wire(type="text", pieces=[None] * 500_000, origins=["?"] * 100_000),
    "three quarters of a million ids": wire(**{**body_of(JOB), "ids": [1] * 750_000}),
    "a key of a megabyte": wire(type="verify", **{"x" * 990_000: 1}),
}


@pytest.mark.parametrize("name", BOMBS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_bomb_costs_what_it_weighs_and_not_what_it_claims(name: str, kind: Any) -> None:
    bomb = BOMBS[name]
    tracemalloc.start()
    started = time.process_time()
    try:
        with pytest.raises(InvalidMessage):
            decode(bomb, kind)
        seconds, peak = time.process_time() - started, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1_000_000 + 20 * len(bomb)
    assert seconds < 0.5


# --- older versions ------------------------------------------------------------------------------------------


@pytest.fixture
def two_versions_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """A synthetic past: version 1 said `device` for agent; version 2 had no boot; version 3 is the page of today."""

    def rename(body: dict[str, Any]) -> dict[str, Any]:
        return {"agent": body.pop("device"), **body}

    monkeypatch.setattr(codec, "WIRE_VERSION", 3)
    monkeypatch.setitem(codec.UPGRADES, 1, rename)
    monkeypatch.setitem(codec.UPGRADES, 2, lambda body: {"boot": "unknown", **body})


@pytest.mark.usefixtures("two_versions_later")
def test_older_wire_versions_still_decode() -> None:
    today = m.Cancel(agent="a", boot="unknown", session=SESSION)
    assert decode(wire(v=1, type="cancel", device="a", session=SESSION), m.ToWorker) == today
    assert decode(wire(v=2, type="cancel", agent="a", session=SESSION), m.ToWorker) == today
    assert decode(encode(today), m.ToWorker) == today


@pytest.mark.usefixtures("two_versions_later")
@pytest.mark.parametrize("version", [0, 4])
def test_a_version_nobody_reads_says_which_side_to_upgrade(version: int) -> None:
    with pytest.raises(InvalidMessage, match="upgrade"):
        decode(wire(v=version, type="cancel", agent="a", session=SESSION), m.ToWorker)


@pytest.mark.usefixtures("two_versions_later")
def test_an_old_message_that_cannot_be_upgraded_is_invalid_like_any_other(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidMessage, match="version 1 message cannot be upgraded"):
        decode(wire(v=1, type="cancel", session=SESSION), m.ToWorker)
    monkeypatch.setitem(codec.UPGRADES, 2, lambda body: 1 / 0)
    with pytest.raises(InvalidMessage, match="version 2 message cannot be upgraded"):
        decode(wire(v=2, type="cancel", session=SESSION), m.ToWorker)
