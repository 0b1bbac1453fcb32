"""What breaks when: a seed's faults, tick by tick, and a seed's generations. Pure, so that a seed replays.

A fault names what is done, to which of its victims, and how long it lasts; `chaos_fleet.py` does it. The plan replays
exactly; how the machine's processes interleave under it does not. (What must replay to the step is a state machine's:
tests/chaos/.) Knows nothing of processes.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from pilotfish.protocol.messages import Mode, OnCloudLoss, Sampling

TICK_SECONDS: Final = 0.25
QUIET: Final = 0.8  # share of ticks in which nothing new breaks

#: fault -> (weight, shortest, longest seconds). A process that is killed is started again after that time.
FAULTS: Final[dict[str, tuple[int, float, float]]] = {
    "kill_worker": (3, 0.1, 3.0),
    "stop_worker": (3, 0.3, 3.0),
    "drain_worker": (1, 0.1, 1.0),
    "kill_engine": (2, 0.0, 0.0),
    "stop_engine": (2, 0.3, 4.0),
    "kill_agent": (1, 0.1, 1.0),
    "stop_agent": (2, 0.3, 5.0),
    "pause_redis": (2, 0.1, 1.5),
    "client_pause": (1, 0.1, 1.0),
    "restart_redis": (1, 0.1, 1.0),
    "empty_redis": (1, 0.1, 1.0),
    "full_redis": (1, 0.2, 1.0),
    "cut_edges": (2, 0.0, 0.5),
    "cut_workers": (2, 0.0, 0.5),
    "part_edges": (2, 0.2, 2.0),
    "part_workers": (2, 0.2, 2.0),
    "flood": (1, 0.0, 0.0),
    "poison": (4, 0.0, 0.0),
}


FULL_STREAM: Final = "full_stream"  # what a worker says when it cuts a stream: floods are to fill them


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that breaks. `victim` is reduced to the number of those there are; `noise` seeds what it sends."""

    name: str
    victim: int
    seconds: float
    noise: int


def faults(seed: int) -> Iterator[Fault | None]:
    """One entry per tick, for ever; None for a quiet one."""
    coin = random.Random(f"faults {seed}")
    names, weights = list(FAULTS), [weight for weight, *_ in FAULTS.values()]
    while True:
        if coin.random() < QUIET:
            yield None
            continue
        (name,) = coin.choices(names, weights)
        _, shortest, longest = FAULTS[name]
        yield Fault(name, coin.randrange(1 << 16), round(coin.uniform(shortest, longest), 2), coin.randrange(1 << 32))


@dataclass(frozen=True, slots=True)
class Wish:
    """One generation. `submitted` goes through Redis to any agent, the others are run by an agent of their own."""

    number: int
    text: str
    mode: Mode
    on_cloud_loss: OnCloudLoss
    sampling: Sampling
    max_tokens: int
    draft_tokens: int
    window: int
    submitted: bool

    @property
    def prompt(self) -> tuple[int, ...]:
        """Token ids: the fake pair's vocabulary is the bytes."""
        return tuple(self.text.encode())


def wish(seed: int, number: int) -> Wish:
    """The `number`th generation of a seed."""
    coin = random.Random(f"wish {seed} {number}")
    return Wish(
        number=number,
        text=f"{number}: " + "".join(coin.choices("abcdefgh ", k=coin.randrange(1, 60))) + ".",
        mode="cloud_only" if coin.random() < 0.2 else "exact",
        on_cloud_loss="local" if coin.random() < 0.4 else "wait",
        sampling=Sampling(temperature=coin.choice([0.0, 0.7, 1.0]), seed=coin.randrange(1 << 32)),
        max_tokens=coin.randrange(20, 160),
        draft_tokens=coin.randrange(0, 6),
        window=coin.randrange(1, 5),
        submitted=coin.random() < 0.3,
    )
