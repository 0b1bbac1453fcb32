"""Pairs and vocabularies: what fits, what does not and why, and bytes in Redis that are no vocabulary."""

from __future__ import annotations

import time
import tracemalloc
import zlib
from typing import Any

import msgpack
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pilotfish.protocol import fleet, keys
from pilotfish.protocol.errors import NoWorker, PairMismatch, SettingsError
from pilotfish.protocol.fleet import Target, Vocabulary, check_pair, pack_vocabulary, unpack_vocabulary

WORDS = (b"the", b" pilot", b" fish", b"\xf0\x9f", b"<eos>")
VOCABULARY = Vocabulary(WORDS, "{{ messages }}", (4,))


def a_target(name: str = "shark", id: str = "0123456789abcdef") -> Target:
    return Target(id, name, 4096, 16, VOCABULARY)


# --- pairs ---------------------------------------------------------------------------------------------------


def test_a_pair_that_reads_every_id_alike_passes() -> None:
    check_pair(VOCABULARY, Vocabulary(WORDS))


def test_a_mismatch_names_the_first_differing_token_and_what_to_do() -> None:
    other = Vocabulary((*WORDS[:2], b" shark", b"x", b"y"))
    with pytest.raises(PairMismatch, match=r"mine and theirs differ at token 2: ' fish' against ' shark'.*choose"):
        check_pair(VOCABULARY, other, ("mine", "theirs"))


def test_bytes_that_are_no_text_are_shown_all_the_same() -> None:
    with pytest.raises(PairMismatch, match=r"token 3: '\\\\xf0\\\\x9f' against 'x'"):
        check_pair(VOCABULARY, Vocabulary((*WORDS[:3], b"x", b"<eos>")))


@pytest.mark.parametrize("padding", [b"", b"[PAD5]", b"<pad>", b"<unused7>", b"<|unused_1|>", b"<|extra_3|>"])
def test_padding_may_differ_in_length(padding: bytes) -> None:
    longer = Vocabulary((*WORDS, padding, padding))
    check_pair(VOCABULARY, longer)
    check_pair(longer, VOCABULARY)


def test_padding_may_differ_in_name() -> None:
    """A GGUF file calls an unused id `[PAD5]`, a Hugging Face table has nothing there."""
    check_pair(Vocabulary((*WORDS, b"[PAD5]")), Vocabulary((*WORDS, b"", b"")))


def test_a_token_that_only_one_knows_is_a_mismatch_on_either_side() -> None:
    longer = Vocabulary((*WORDS, b"", b" whale"))
    for pair in ((VOCABULARY, longer), (longer, VOCABULARY)):
        with pytest.raises(PairMismatch, match="the first that only one knows is 6, ' whale'"):
            check_pair(*pair)
    with pytest.raises(PairMismatch, match="differ at token 5"):
        check_pair(Vocabulary((*WORDS, b"[PAD5]")), Vocabulary((*WORDS, b" whale")))


def test_the_hash_of_a_vocabulary_knows_where_tokens_end() -> None:
    assert fleet.vocabulary_hash([b"ab", b"c"]) != fleet.vocabulary_hash([b"a", b"bc"])
    assert fleet.vocabulary_hash(WORDS) == fleet.vocabulary_hash(list(WORDS))


# --- packed --------------------------------------------------------------------------------------------------


@given(st.lists(st.binary(max_size=8), min_size=1, max_size=20), st.text(max_size=20), st.data())
def test_what_is_packed_unpacks_to_the_same(tokens: list[bytes], template: str, data: st.DataObject) -> None:
    stops = data.draw(st.lists(st.integers(0, len(tokens) - 1), max_size=3))
    vocabulary = Vocabulary(tuple(tokens), template, tuple(stops))
    assert unpack_vocabulary(pack_vocabulary(vocabulary)) == vocabulary


@given(st.integers(0, 10_000), st.integers(1, 255), st.booleans())
@example(0, 1, True)
def test_corrupted_bytes_are_a_mismatch_and_nothing_else(at: int, flip: int, cut: bool) -> None:
    data = bytearray(pack_vocabulary(VOCABULARY))
    at %= len(data)
    data[at] ^= flip
    try:
        unpack_vocabulary(bytes(data[:at] if cut else data))
    except PairMismatch as error:
        assert "restart its worker" in str(error)


@given(st.binary(max_size=100))
def test_any_bytes_inside_the_compression_are_a_mismatch(data: bytes) -> None:
    with pytest.raises(PairMismatch):
        unpack_vocabulary(zlib.compress(data))


@pytest.mark.parametrize(
    "value",
    [
        {b"a": 1},
        [{b"a": 1}, "", []],
        [["text"], "", []],
        [[b"a"], b"", []],
        [[b"a"], "", [1]],
        [[b"a"], "", [-1]],
        [[b"a"], "", [0.0]],
        [[b"a"], "", [True]],
        [[b"a"], "", {}],
        [[b"a"], ""],
        [[b"a"], "", [], 1],
    ],
    ids=str,
)
def test_fields_of_the_wrong_type_are_a_mismatch(value: Any) -> None:
    with pytest.raises(PairMismatch, match="restart its worker"):
        unpack_vocabulary(zlib.compress(msgpack.packb(value)))


@pytest.mark.parametrize(
    "inflated",
    [b"\x93" + b"\xdd\x00\xff\xff\xff" * 500, b"\x00" * 200_000_000, b"\xdc\xff\xff" + b"\xc0" * 65_535],
    ids=["nested claims", "two hundred megabytes of nothing", "not three fields"],
)
def test_a_decompression_bomb_is_bounded(inflated: bytes) -> None:
    bomb = zlib.compress(inflated)
    del inflated
    tracemalloc.start()
    started = time.process_time()
    try:
        with pytest.raises(PairMismatch):
            unpack_vocabulary(bomb)
        seconds, peak = time.process_time() - started, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 3 * fleet.MAX_PAIR_BYTES
    assert seconds < 1


# --- in Redis ------------------------------------------------------------------------------------------------


async def beat(redis: Any, target: str) -> None:
    seconds, _ = await redis.time()
    await redis.zadd(keys.workers(target), {"w": seconds * 1000 + 999})
    await redis.pexpire(keys.workers(target), keys.JOBS_TTL_MS)


async def test_an_announced_target_is_found_as_it_was(redis: Any) -> None:
    for wanted in (a_target(), a_target("my models/shark 7B", "f" * 16)):
        await fleet.announce(redis, wanted)
        await beat(redis, wanted.id)
        assert await fleet.find_target(redis, wanted.name) == wanted
        assert await fleet.find_target(redis, wanted.id[:4]) == wanted


async def test_a_target_without_a_live_worker_is_not_found(redis: Any) -> None:
    await fleet.announce(redis, a_target())
    with pytest.raises(NoWorker, match=r"any target.*pilotfish worker"):
        await fleet.find_target(redis)


async def test_of_several_targets_one_must_be_chosen_and_its_whole_name_chooses_it(redis: Any) -> None:
    for target in (a_target(), a_target("shark-large", "f" * 16)):
        await fleet.announce(redis, target)
        await beat(redis, target.id)
    with pytest.raises(SettingsError, match=r"\(shark\).*\(shark-large\).*--target"):
        await fleet.find_target(redis)
    assert (await fleet.find_target(redis, "shark")).name == "shark"


async def test_what_someone_else_wrote_under_a_target_is_refused_with_a_sentence(redis: Any) -> None:
    await fleet.announce(redis, a_target())
    await beat(redis, a_target().id)
    await redis.set(keys.pair(a_target().id), b"nonsense", px=1000)
    with pytest.raises(PairMismatch, match="restart its worker"):
        await fleet.find_target(redis)
    await redis.hset(keys.TARGETS, a_target().id, b"shark context=many")
    with pytest.raises(NoWorker, match="cannot be read"):
        await fleet.find_target(redis)
