"""vLLM's own names for KV blocks, computed without vLLM: SHA-256 over canonical CBOR, chained block by block.

    hash(0) = sha256(cbor((sha256(cbor("vllm-none-hash")), ids of block 0, None or (("cache_salt", salt),))))
    hash(i) = sha256(cbor((hash(i - 1), ids of block i, None)))

Only full blocks have a name, and a name stands for every token before it too. Follows vllm/v1/core/kv_cache_utils.py
and vllm/utils/hashing.py (`sha256_cbor`) of 0.32.0; another version may compute other names, so `check_engine` compares
one chain before a worker tells others what it holds. Values in, values out; the standard library only.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Final

from pilotfish.protocol.errors import EngineError

SHORT_BYTES: Final = 8  # of a hash that an index keeps: enough to tell 2^31 blocks apart

_PLAIN: Final = b"\xf6"  # CBOR null: no extra keys
_KEPT: Final = 1 << 17  # encoded ids that are remembered


def block_hashes(ids: Sequence[int], block_size: int, salt: str = "", known: Sequence[bytes] = ()) -> list[bytes]:
    """Names (32 bytes each) of the full blocks of `ids`; `known` are those of the first blocks, which it repeats."""
    hashes = list(known)
    for start in range(len(hashes) * block_size, len(ids) - block_size + 1, block_size):
        extra = _salted(salt) if salt and not start else _PLAIN
        parent = hashes[-1] if hashes else NONE_HASH
        block = ids[start : start + block_size]
        hashes.append(hashlib.sha256(_block(parent, block, extra)).digest())
    return hashes


def short(block_hash: bytes) -> bytes:
    """The part of a block's name that is kept and sent: its end, as in vLLM's events that carry numbers."""
    return block_hash[-SHORT_BYTES:]


def cacheable(n_ids: int, block_size: int) -> int:
    """How many blocks of a prefix an engine can take from its cache: the last token is always computed."""
    return max(0, n_ids - 1) // block_size


# --- canonical CBOR (RFC 8949 §4.2), as far as it goes here --------------------------------------------------------


def _head(major: int, argument: int) -> bytes:
    """The first bytes of an item: its major type and its length or value, in the shortest form."""
    lead = major << 5
    if argument < 24:
        return bytes((lead | argument,))
    for code, size in ((24, 1), (25, 2), (26, 4)):
        if argument < 1 << 8 * size:
            return bytes((lead | code,)) + argument.to_bytes(size, "big")
    return bytes((lead | 27,)) + argument.to_bytes(8, "big")


@lru_cache(_KEPT)
def _unsigned(value: int) -> bytes:
    return _head(0, value)


def _text(text: str) -> bytes:
    raw = text.encode()
    return _head(3, len(raw)) + raw


def _block(parent: bytes, ids: Sequence[int], extra: bytes) -> bytes:
    items = b"".join(map(_unsigned, ids))
    return _head(4, 3) + _head(2, len(parent)) + parent + _head(4, len(ids)) + items + extra


def _salted(salt: str) -> bytes:
    return _head(4, 1) + _head(4, 2) + _text("cache_salt") + _text(salt)


NONE_HASH: Final = hashlib.sha256(_text("vllm-none-hash")).digest()


# --- is the engine's the same? -------------------------------------------------------------------------------------

VECTOR_SALT: Final = "tenant"
#: short names of the blocks of ids 0, 997, 1994 ... (8 a block, three blocks), plain and salted, by vLLM 0.32.0
VECTOR: Final = (
    "d73edcf1ce44d59ae25c18cb6e95b75e07a4bd85f5c6d92a",
    "b1c17fdce5eaa557f6bd07f438153bba038425766b123461",
)


def vector(hashes: Callable[[Sequence[int], int, str], Sequence[bytes]]) -> tuple[str, str]:
    """What an engine's own hash function says about the pinned chain, as hex."""
    ids = [997 * i for i in range(24)]
    plain, salted = (hashes(ids, 8, salt) for salt in ("", VECTOR_SALT))
    return b"".join(map(short, plain)).hex(), b"".join(map(short, salted)).hex()


def check_engine(hashes: Callable[[Sequence[int], int, str], Sequence[bytes]]) -> None:
    """Raise EngineError unless an engine names blocks as this page does."""
    if (found := vector(hashes)) != VECTOR:
        raise EngineError(
            f"the engine names KV blocks {found[0][:16]}... where {VECTOR[0][:16]}... was pinned: its hashing changed "
            "(or PYTHONHASHSEED is set), so no prefix index can be kept; unset it, or install the pinned version"
        )
