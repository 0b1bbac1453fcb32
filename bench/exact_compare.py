"""Two modes, one seed, token by token: what `bench exact` counts, whatever the engine.

Every prompt is generated in `exact` and in `cloud_only`. Where they part, the difference is noted with the prefix both
agree on, both start again behind cloud_only's token, and the comparison goes on. Several prompts run at a time and the
two modes are mixed, so that rounds and continuations of different sessions share the engine's passes.
"""

from __future__ import annotations

import asyncio
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from pilotfish.edge_agent.agent import Agent
from pilotfish.edge_agent.task import Task
from pilotfish.protocol.messages import Mode, Sampling, Summary

CONCURRENT = 8
SEED = 20_000
DRAFTS = (4, 5, 6, 7, 8)  # K of a prompt, in turn, and 1 to 3 rounds at a time: the text must not depend on it
DEADLINE_MS = 600_000
COUNTED = ("tokens", "rounds", "drafted", "accepted", "cloud_rows", "cloud_steps", "cloud_ms", "draft_ms", "resends")


@dataclass(frozen=True, slots=True)
class Item:
    """One prompt: token ids, how long an answer may get, and the right one where there is one."""

    number: int
    prompt: tuple[int, ...]
    max_tokens: int
    answer: str | None = None


@dataclass(frozen=True, slots=True)
class Difference:
    """Where the modes parted: the ids both agree on, what each drew next (None: it had ended)."""

    setting: str
    item: int
    sampling: Sampling
    prefix: tuple[int, ...]
    exact: int | None
    cloud: int | None


@dataclass(slots=True)
class Tally:
    """What a setting came to. `texts`: item -> prompt and answer of cloud_only."""

    tokens: int = 0
    differences: list[Difference] = field(default_factory=list)
    costs: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    right: list[bool] = field(default_factory=list)
    texts: dict[int, tuple[int, ...]] = field(default_factory=dict)

    def add(self, mode: str, summary: Summary) -> None:
        """Count what one generation cost."""
        for name in COUNTED:
            self.costs[mode][name] += getattr(summary, name)


async def compare_all(agent: Agent, items: Iterable[Item], setting: str, sampling: Sampling) -> Tally:
    """Every item, CONCURRENT of them at a time."""
    tally, waiting = Tally(), list(reversed(list(items)))

    async def lane() -> None:
        while waiting:
            await compare(agent, waiting.pop(), setting, sampling, tally)

    async with asyncio.TaskGroup() as lanes:
        for _ in range(CONCURRENT):
            lanes.create_task(lane())
    return tally


async def compare(agent: Agent, item: Item, setting: str, sampling: Sampling, tally: Tally) -> None:
    """One item, to its end, through every difference."""
    sampling = sampling.model_copy(update={"seed": SEED + item.number})
    prompt, left, first = item.prompt, item.max_tokens, True
    while left > 0:
        rest = replace(item, prompt=prompt, max_tokens=left)
        exact = await generate(agent, rest, "exact", sampling, tally)
        cloud = await generate(agent, rest, "cloud_only", sampling, tally)
        if first:
            note_answer(agent, item, cloud, tally)
            first = False
        at = first_difference(exact, cloud)
        tally.tokens += len(cloud) if at is None else at + 1
        if at is None:
            return
        tally.differences.append(
            Difference(setting, item.number, sampling, (*prompt, *cloud[:at]), _at(exact, at), _at(cloud, at))
        )
        if at >= len(cloud) or cloud[at] in agent.stop_ids:
            return
        prompt, left = (*prompt, *cloud[: at + 1]), left - at - 1


async def generate(agent: Agent, item: Item, mode: Mode, sampling: Sampling, tally: Tally) -> list[int]:
    """The ids of one generation."""
    task = Task(
        prompt=item.prompt, mode=mode, sampling=sampling, max_tokens=item.max_tokens, stop_ids=agent.stop_ids,
        drafting="fixed", draft_tokens=DRAFTS[item.number % len(DRAFTS)], window=1 + item.number % 3,
        deadline_ms=DEADLINE_MS, round_timeout_ms=60_000,
    )  # fmt: skip
    generation = agent.open(task)
    try:
        ids = [token.id async for tokens in generation.run() for token in tokens]
        tally.add(mode, generation.summary())
    finally:
        agent.close(generation)
    return ids


def first_difference(exact: Sequence[int], cloud: Sequence[int]) -> int | None:
    """Index of the first token that only one of them has, or None."""
    if list(exact) == list(cloud):
        return None
    same = (i for i, (a, b) in enumerate(zip(exact, cloud, strict=False)) if a != b)
    return next(same, min(len(exact), len(cloud)))


def note_answer(agent: Agent, item: Item, ids: Sequence[int], tally: Tally) -> None:
    """Whether the target's answer is right, and its ids."""
    tally.texts[item.number] = (*item.prompt, *ids)
    if item.answer is not None:
        said = b"".join(agent.tokenizer.piece(token) for token in ids if token not in agent.stop_ids)
        tally.right.append(said == item.answer.encode())


def _at(ids: Sequence[int], index: int) -> int | None:
    return ids[index] if index < len(ids) else None
