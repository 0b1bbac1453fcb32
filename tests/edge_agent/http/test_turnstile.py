from __future__ import annotations

import asyncio

import pytest

from helpers import wait_until
from pilotfish.edge_agent.http.turnstile import RETRY_MAX_SECONDS, Turnstile
from pilotfish.protocol.errors import Overloaded


class Crowd:
    """Clients that enter and stay until they are let out; `order` is who got in."""

    def __init__(self, turnstile: Turnstile) -> None:
        self.turnstile, self.order = turnstile, list[str]()
        self.tasks: dict[str, asyncio.Task[None]] = {}
        self.out: dict[str, asyncio.Event] = {}

    async def come(self, *names: str) -> None:
        """A name is its client's letter and a number."""
        for name in names:
            self.out[name] = asyncio.Event()
            self.tasks[name] = asyncio.create_task(self._stay(name))
            await asyncio.sleep(0)

    async def _stay(self, name: str) -> None:
        async with self.turnstile.place(name[0]):
            self.order.append(name)
            await self.out[name].wait()

    async def leave(self, name: str) -> None:
        self.out[name].set()
        await self.tasks[name]
        await asyncio.sleep(0)

    async def leave_all(self) -> None:
        """One after another, in the order they got in."""
        for index in range(len(self.tasks)):
            await wait_until(lambda: len(self.order) > index, "the next one to get in")  # noqa: B023
            await self.leave(self.order[index])


async def test_places_are_bounded_and_turns_go_round_the_clients() -> None:
    crowd = Crowd(Turnstile(1, 100))
    await crowd.come(*"a1 a2 a3 a4 b1 b2 c1".split())
    assert (crowd.turnstile.running, crowd.turnstile.waiting) == (1, 6)
    await crowd.leave_all()
    assert crowd.order == "a1 a2 b1 c1 a3 b2 a4".split()
    assert (crowd.turnstile.running, crowd.turnstile.waiting) == (0, 0)


async def test_who_holds_the_fewest_places_is_next() -> None:
    crowd = Crowd(Turnstile(3, 100))
    await crowd.come(*"a1 a2 a3 a4 a5 b1 b2".split())
    await crowd.leave("a1")
    assert crowd.order[-1] == "b1"
    await crowd.leave("a2")
    assert crowd.order[-1] == "a4" or crowd.order[-1] == "b2"
    await crowd.leave("a3")
    assert sorted(crowd.order[-2:]) == ["a4", "b2"]
    for name in "b1 b2 a4 a5".split():
        await crowd.leave(name)


async def test_who_gives_up_waiting_leaves_no_trace() -> None:
    crowd = Crowd(Turnstile(1, 100))
    await crowd.come("a1", "b1", "c1")
    crowd.tasks["b1"].cancel()
    await crowd.leave("a1")
    assert crowd.order == ["a1", "c1"]
    await crowd.leave("c1")
    assert (crowd.turnstile.running, crowd.turnstile.waiting) == (0, 0)


async def test_a_place_given_to_one_who_just_gave_up_goes_on_to_the_next() -> None:
    crowd = Crowd(Turnstile(1, 100))
    await crowd.come("a1", "b1", "c1")
    crowd.out["a1"].set()
    await wait_until(lambda: crowd.tasks["a1"].done(), "a1 to leave")
    crowd.tasks["b1"].cancel()
    await wait_until(lambda: "c1" in crowd.order, "c1 to get in")
    await crowd.leave("c1")
    assert crowd.turnstile.running == 0


async def test_a_full_house_says_when_to_come_back() -> None:
    turnstile = Turnstile(1, 2)
    crowd = Crowd(turnstile)
    await crowd.come("a1", "a2")
    turnstile.check(1)
    with pytest.raises(Overloaded, match="1 generations run here and 1 wait") as caught:
        turnstile.check(2)
    assert 1 <= caught.value.retry_after_s <= RETRY_MAX_SECONDS
    await crowd.leave_all()
