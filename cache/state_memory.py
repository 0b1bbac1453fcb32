"""Memory for saved KV states, a mapping of its own for each: what is freed goes back to the system at once.

The allocator's heap would keep it, and a budget in bytes would not be the process's own growth.
"""

from __future__ import annotations

import mmap


def allocate(n_bytes: int) -> memoryview:
    """Writable zeroes; gone with the last view of them."""
    return memoryview(mmap.mmap(-1, max(1, n_bytes)))[:n_bytes]


def resident(n_bytes: int) -> int:
    """The bytes such a mapping takes: whole pages."""
    return -(-n_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
