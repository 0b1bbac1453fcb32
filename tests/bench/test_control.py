"""`bench control` on made-up records: the clock is exact, the baseline's closed form is its replay, the rule adapts."""

from __future__ import annotations

import asyncio
import random
from dataclasses import replace
from typing import Any

import pytest

from pilotfish.bench import control, virtual_time
from pilotfish.bench.control_fixed import all_totals, best, totals
from pilotfish.bench.control_record import Astray, Record, acceptance, record
from pilotfish.bench.control_replay import replay
from pilotfish.bench.control_times import Times
from pilotfish.bench.recording import Asked, target_texts
from pilotfish.bench.wrapped import PacedDrafter
from pilotfish.cloud_worker.engines.fake import FakeVerifier, fake_target
from pilotfish.edge_agent.drafters.fake import FakeDrafter
from pilotfish.protocol.messages import Sampling

STOP, STOPS = 1, frozenset({1})
TIMES = Times(token=5.0, rtt=50.0, job=4.0, row=0.4, step=4.5, broker=1.0)


def made_up(count: int = 12, alpha: float = 0.85, length: int = 40, seed: int = 3) -> list[Record]:
    """Texts of any ids; the draft is right with chance `alpha`, and its score says how often."""
    dice = random.Random(seed)

    def one(number: int) -> Record:
        text = [dice.randrange(2, 200) for _ in range(dice.randrange(5, length))]
        text += [STOP] if number % 2 else []
        drafts = [token if dice.random() < alpha else token + 200 for token in text]
        astray = {
            at: Astray(tuple(dice.randrange(400, 500) for _ in range(64)), (0.3,) * 64)
            for at, (drafted, drawn) in enumerate(zip(drafts, text, strict=True))
            if drafted != drawn
        }
        limit = length + 8 if text[-1] == STOP else len(text)
        return Record((7, 8, number + 2), tuple(text), limit, tuple(drafts), (alpha,) * len(text), astray)

    return [one(number) for number in range(count)]


# --- the clock -----------------------------------------------------------------------------------------------


def test_an_hour_passes_at_once_and_exactly() -> None:
    async def wait() -> list[float]:
        loop = asyncio.get_running_loop()
        await asyncio.gather(asyncio.sleep(1800), asyncio.sleep(3600))
        return [loop.time()]

    assert virtual_time.run(wait()) == [3600.0]


def test_waiting_for_nothing_is_an_error_and_no_hang() -> None:
    async def wait() -> None:
        await asyncio.Event().wait()

    with pytest.raises(RuntimeError, match="nothing will ever happen"):
        virtual_time.run(wait())


# --- the record ----------------------------------------------------------------------------------------------


def test_a_record_knows_the_targets_text_the_drafts_on_it_and_where_they_lead() -> None:
    prompt = (5, 6, 7)
    (text,) = target_texts(FakeVerifier(), [Asked(prompt, 60)], frozenset())
    found = record(FakeDrafter(fake_target, alpha=0.6), Asked(prompt, 60), text, frozenset())
    assert found.text[0] == fake_target(prompt, 3, Sampling())
    assert 0.3 < acceptance([found]) < 0.9
    at, path = next(iter(found.astray.items()))
    assert found.proposal(found.text[:at]) == (found.drafts[at], found.scores[at])
    assert found.proposal([*found.text[:at], found.drafts[at]]) == (path.ids[0], path.scores[0])
    assert found.proposal([*found.text[:at], found.drafts[at], path.ids[0]])[0] == path.ids[1]


# --- the replay ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 4, 17, 64])
@pytest.mark.parametrize(("token", "rtt"), [(0.3, 0.0), (15.0, 100.0)])
def test_the_closed_form_of_a_fixed_draft_is_its_replay(k: int, token: float, rtt: float) -> None:
    records, times = made_up(), replace(TIMES, token=token, rtt=rtt)
    played = replay(records, times, STOPS, drafting="fixed", draft_tokens=k, window=1)
    formula = totals(records, k, STOPS)
    assert played.ms == pytest.approx(formula.ms(times))
    assert (played.tokens, played.rows, len(played.jobs)) == (formula.tokens, formula.rows, formula.rounds)


@pytest.mark.parametrize("task", [*control.WAYS.values(), {"mode": "cloud_only"}, {"window": 3, "drafting": "always"}])
def test_whatever_the_way_the_text_is_the_targets(task: dict[str, Any]) -> None:
    records = made_up()
    assert replay(records, TIMES, STOPS, **task).tokens == sum(len(record.text) for record in records)


def test_the_rule_keeps_up_with_the_best_fixed_draft_and_beats_it_by_drafting_on() -> None:
    records = made_up(80)
    found = best(all_totals(records, STOPS), TIMES)
    rule = replay(records, TIMES, STOPS, **control.WAYS["stop_rule"])
    pipelined = replay(records, TIMES, STOPS, **control.WAYS["pipelined"])
    assert rule.rate > 0.95 * found.rate(TIMES)
    assert pipelined.rate > 1.15 * found.rate(TIMES)


def test_drafts_follow_a_round_trip_that_grows_in_the_middle_of_a_run() -> None:
    records = made_up(80)
    told = control.Replays(records, STOPS, TIMES).changing()
    assert told["mean_draft_after"] > 1.3 * told["mean_draft_before"]


def test_no_more_rounds_are_under_way_than_the_window_allows() -> None:
    records, times = made_up(), replace(TIMES, rtt=400.0)
    for window in (1, 2, 5):
        jobs = replay(records, times, STOPS, drafting="always", window=window).jobs
        starts = [at for at, _ in jobs]
        away = 0.4  # s; nothing can be back sooner
        assert max(sum(at <= other < at + away - 1e-9 for other in starts) for at in starts) <= window


def test_where_the_cloud_alone_is_faster_drafting_switches_itself_off_and_is_tried_again() -> None:
    records = made_up(60, alpha=0.3)
    played = replay(records, TIMES, STOPS, **control.WAYS["auto"])
    alone = replay(records, TIMES, STOPS, mode="cloud_only")
    assert played.ceded > 0.7 * played.tokens
    assert played.rate > 0.8 * alone.rate
    assert sum(size > 0 for _, size in played.jobs[len(played.jobs) // 2 :]) > 0


def test_where_drafting_is_faster_the_cloud_is_not_asked_to_write() -> None:
    times = replace(TIMES, token=0.5, rtt=0.0, step=40.0, job=40.0)
    assert replay(made_up(40, alpha=0.95), times, STOPS, **control.WAYS["auto"]).ceded == 0


# --- the report ----------------------------------------------------------------------------------------------


def test_the_report_has_the_names_of_the_design_and_decides_nothing_on_a_small_sample() -> None:
    found = control.Replays(made_up(4), STOPS, TIMES)
    cell = found.cell(5.0, 50.0)
    figures = {
        "cells": [cell],
        "one_k_for_all": found.one_k([cell]),
        "live": [{"ratio": 0.97}, {"ratio": 1.04}],
    }
    judged = {one.name: one for one in control.targets(figures, enough=False)}
    assert {"vs_best_fixed_k", "pipelined_vs_best_fixed_k_rtt50"} <= set(judged)
    assert judged["live_off_replay"].value == pytest.approx(0.04)
    assert all(one.met is None for one in judged.values())
    assert cell["pipelined_ms_per_token"] > 0


def test_live_runs_are_judged_by_the_times_of_their_own_block() -> None:
    """A machine that was twice as slow for one block of three moves nothing."""
    records, runs = made_up(6), list[control.Run]()
    for slow in (1.0, 2.0, 1.0):
        for token, rtt in control.LIVE:
            for way in ("stop_rule", "pipelined"):
                times = replace(TIMES, token=token, rtt=rtt, job=TIMES.job * slow, row=TIMES.row * slow)
                speed = replay(records, times, STOPS, **control.WAYS[way]).rate
                runs.append(control.Run(way, records, times, speed * (0.5 if slow > 1 else 0.98)))
    told = control.live_figures(runs, STOPS)
    assert [one["ratio"] for one in told] == [0.98] * 6
    assert [one["rtt_ms"] for one in told] == [10.0, 10.0, 50.0, 50.0, 50.0, 50.0]
    assert control.middle([run.times for run in runs]).job == TIMES.job


def test_the_prediction_is_the_designs() -> None:
    assert TIMES.predicted_ms(1.0) == 5.0
    assert TIMES.predicted_ms(0.9) == pytest.approx(5 + 0.1 * (50 + 1 + 4 + 0.8 + 5))


def test_a_paced_draft_takes_its_time_for_every_token_and_says_the_same() -> None:
    plain = FakeDrafter(fake_target, alpha=0.5)
    paced = PacedDrafter(plain)
    paced.token_ms = 4.0
    wanted = plain.draft("s", [1, 2, 3], 5, Sampling())
    got = paced.draft("s", [1, 2, 3], 5, Sampling())
    assert (got.ids, got.confidences) == (wanted.ids, wanted.confidences)
    assert got.ms >= 20
    assert len(paced.draft("s", [1, 2, 3], 5, Sampling(), proceed=lambda *_: False).ids) == 1


@pytest.mark.llamacpp
@pytest.mark.slow
def test_the_demo_pair_is_recorded_and_replayed() -> None:
    from pilotfish.bench.control_record import record_all
    from pilotfish.demo import pair

    records, stop_ids = record_all(pair.target_gguf(), pair.draft_gguf(), pair.EVAL_FILE, stride=80)
    assert acceptance(records) > 0.6
    assert all(len(one.text) <= one.limit for one in records)
    assert replay(records, TIMES, stop_ids, **control.WAYS["auto"]).tokens == sum(len(one.text) for one in records)
