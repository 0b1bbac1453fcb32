"""vLLM's block hashes without vLLM: the pinned vector, the chain's laws, and ten thousand cases against the engine."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pilotfish.cache.block_hash import VECTOR, _head, block_hashes, cacheable, check_engine, short, vector
from pilotfish.protocol.errors import EngineError

IDS = st.lists(st.integers(0, 2**31 - 1), max_size=100)
SIZE = st.integers(1, 40)
SALT = st.text(max_size=30)


def test_the_pinned_vector_is_computed() -> None:
    assert vector(block_hashes) == VECTOR
    check_engine(block_hashes)


def test_the_first_block_by_hand() -> None:
    none = hashlib.sha256(b"\x6evllm-none-hash").digest()
    one = hashlib.sha256(b"\x83\x58\x20" + none + b"\x84\x00\x17\x18\x18\x19\x01\x00" + b"\xf6").digest()
    assert block_hashes([0, 23, 24, 256], 4) == [one]


def test_an_engine_that_hashes_otherwise_is_refused() -> None:
    def changed(ids: Sequence[int], block_size: int, salt: str) -> list[bytes]:
        return block_hashes(ids, block_size, salt + "!")

    with pytest.raises(EngineError, match="its hashing changed"):
        check_engine(changed)


@pytest.mark.parametrize(
    ("value", "size"), [(23, 1), (24, 2), (255, 2), (256, 3), (65_535, 3), (65_536, 5), (2**32, 9)]
)
def test_integers_take_their_shortest_form(value: int, size: int) -> None:
    assert len(_head(0, value)) == size


@given(IDS, SIZE, SALT)
def test_a_longer_text_keeps_the_names_of_its_prefix(ids: list[int], size: int, salt: str) -> None:
    hashes = block_hashes(ids, size, salt)
    assert len(hashes) == len(ids) // size
    assert hashes == block_hashes([*ids, 1, 2, 3], size, salt)[: len(hashes)]
    assert all(block_hashes(ids, size, salt, hashes[:n]) == hashes for n in (0, 1, len(hashes)))


@given(IDS.filter(bool), SIZE, st.data())
def test_a_changed_id_renames_its_block_and_all_after_it(ids: list[int], size: int, data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(ids) - 1))
    other = [*ids[:at], ids[at] ^ 1, *ids[at + 1 :]]
    ours, theirs = block_hashes(ids, size), block_hashes(other, size)
    same = [one == two for one, two in zip(ours, theirs, strict=True)]
    assert same == [block < at // size for block in range(len(ours))]


@given(IDS.filter(lambda ids: len(ids) > 2), SALT.filter(bool))
def test_tenants_share_no_name(ids: list[int], salt: str) -> None:
    assert not set(block_hashes(ids, 2)) & set(block_hashes(ids, 2, salt))


@given(st.integers(0, 100), SIZE)
def test_the_last_token_is_never_taken_from_a_cache(n: int, size: int) -> None:
    assert cacheable(n, size) * size < max(1, n)
    assert cacheable(n, size) * size >= n - size


def test_a_short_name_is_its_end() -> None:
    assert short(bytes(range(32))) == bytes(range(24, 32))


# --- against the engine ------------------------------------------------------------------------------------------


@pytest.mark.vllm
def test_ten_thousand_random_cases_are_those_of_vllm() -> None:
    from pilotfish.cloud_worker.engines.vllm_kv_events import engine_hashes

    check_engine(engine_hashes)
    rng = random.Random(9)
    for _ in range(10_000):
        widest = 1 << rng.choice((3, 8, 16, 20, 31))
        ids = [rng.randrange(widest) for _ in range(rng.randrange(150))]
        size, salt = rng.randrange(1, 40), rng.choice(("", "a", "é" * 20, "0" * 64))
        assert block_hashes(ids, size, salt) == engine_hashes(ids, size, salt)
