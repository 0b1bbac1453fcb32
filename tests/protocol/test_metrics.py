"""The metrics page: what it lists exists, what exists it lists, and a generation moves it."""

from __future__ import annotations

import re

from pilotfish.cloud_worker.engines.base import EngineInfo, VerifyEvent
from pilotfish.cloud_worker.verify import Ticket, Verification
from pilotfish.edge_agent.drafters.base import Draft
from pilotfish.edge_agent.generation import Generation
from pilotfish.edge_agent.task import Task
from pilotfish.protocol import metrics
from pilotfish.protocol.messages import Refusal, Sampling, VerifyJob


def value(name: str, **labels: str) -> float:
    return metrics.REGISTRY.get_sample_value(name, labels) or 0.0


def test_the_table_lists_exactly_the_metrics_there_are() -> None:
    listed = set(re.findall(r"^    (?:both|worker|edge) +(\w+)", metrics.__doc__ or "", re.M))
    names = {sample.name + ("_total" if sample.type == "counter" else "") for sample in metrics.REGISTRY.collect()}
    assert listed == names


def test_no_label_can_grow_with_sessions() -> None:
    labels = {label for metric in vars(metrics).values() for label in getattr(metric, "_labelnames", ())}
    assert labels == {"outcome", "origin", "fate", "route", "status"}


def written_and_ended() -> tuple[float, float]:
    written = value("pilotfish_generation_tokens_total", origin="local")
    return written, value("pilotfish_generations_total", outcome="length")


async def test_a_local_generation_counts_its_tokens_once() -> None:
    async def draft(_: str, ids: object, count: int, *__: object) -> Draft:
        return Draft([7] * count, [1.0] * count, 0.0)

    before = (
        value("pilotfish_generation_tokens_total", origin="local"),
        value("pilotfish_generations_total", outcome="length"),
    )
    generation = Generation(Task((1,), "edge_only", max_tokens=9), draft, None, None, 256)
    written = [token async for tokens in generation.run() for token in tokens]
    after = (
        value("pilotfish_generation_tokens_total", origin="local"),
        value("pilotfish_generations_total", outcome="length"),
    )
    assert len(written) == 9
    assert (after[0] - before[0], after[1] - before[1]) == (9, 1)


async def test_a_refused_job_is_counted_under_its_code() -> None:
    class Engine:
        info = EngineInfo("fake", "1", "0" * 64, 256, 16, 4, "fake")

        def stream(self, _: object) -> VerifyEvent:
            raise AssertionError("a job that is too long never reaches the engine")

    async def answer(message: object, last: bool) -> None:
        assert isinstance(message, Refusal)
        assert message.code == "too_long"
        assert last

    job = VerifyJob(
        agent="a", boot="b", session="0" * 32, epoch=0, round=0, base=16, digest=bytes(16), offset=0, ids=(1,) * 16,
        sampling=Sampling(),
    )  # fmt: skip
    before = value("pilotfish_jobs_total", outcome="too_long")
    await Verification(Engine(), "w", lambda tenant: 1).handle(Ticket("default", job, 0, "r"), answer)  # type: ignore[arg-type]
    assert value("pilotfish_jobs_total", outcome="too_long") == before + 1


def test_the_plain_view_names_values_by_their_label() -> None:
    metrics.TOKENS.labels("local").inc(0)
    told = metrics.plain()
    assert told["pilotfish_generation_tokens_total{local}"] == value(
        "pilotfish_generation_tokens_total", origin="local"
    )
    assert "pilotfish_num_requests_running" in told
    assert not [name for name in told if "bucket" in name or "created" in name]


def test_a_beat_tells_sums_as_whole_numbers() -> None:
    metrics.TOKENS.labels("accepted").inc(2)
    told = metrics.told()
    assert int(told["accepted_tokens"]) >= 2
    assert {"drafted_tokens", "generations", "resends", "audited_tokens", "audit_disagreements"} <= told.keys()
