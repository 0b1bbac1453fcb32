"""The session's rules one by one, each with the few ids it needs. The state machine beside this file mixes them."""

from __future__ import annotations

from typing import Any

import pytest

from pilotfish.edge_agent.session import Committed, Limits, Round, Session
from pilotfish.protocol.history import History
from pilotfish.protocol.messages import Refusal, Sampling, Verdict, VerifyJob

SAMPLING = Sampling(temperature=0.7, seed=5)
TARGET = "0123456789abcdef"
PROMPT = (10, 11, 12)


def a_session(*, max_tokens: int = 20, window: int = 1, stop_ids: frozenset[int] = frozenset()) -> Session:
    return Session.start("a" * 32, TARGET, SAMPLING, PROMPT, Limits(max_tokens, stop_ids, window), vocab_size=100)


def job_of(session: Session, flying: Round) -> VerifyJob:
    return session.job(flying, agent="agent", boot="boot", deadline_ms=1000)


def verdict(job: VerifyJob, *draws: int, **changes: Any) -> Verdict:
    """What a worker that drew `draws` answers to a job."""
    said = Verdict(
        boot=job.boot,
        session=job.session,
        epoch=job.epoch,
        round=job.round,
        base=job.base,
        digest=job.digest,
        draws=draws,
        accepted=len(draws) - 1,
        worker="w",
        credit=1,
    )
    return said.model_copy(update=changes)


def publish(session: Session, *draft: int, continues: int = 0) -> VerifyJob:
    return job_of(session, session.publish(draft, continues))


def ids(committed: list[Committed]) -> list[int]:
    return [token.id for token in committed]


def origins(committed: list[Committed]) -> list[str]:
    return [token.origin for token in committed]


# --- one round -----------------------------------------------------------------------------------------------


def test_full_acceptance_commits_the_draft_and_a_bonus_token() -> None:
    session = a_session()
    out = session.on_verdict(verdict(publish(session, 20, 21), 20, 21, 22))
    assert ids(out) == [20, 21, 22]
    assert origins(out) == ["accepted", "accepted", "continued"]
    assert session.epoch == 0
    assert session.flight == []


def test_a_rejected_draft_commits_the_targets_token_and_bumps_the_epoch() -> None:
    session = a_session()
    out = session.on_verdict(verdict(publish(session, 20, 21), 20, 99))
    assert ids(out) == [20, 99]
    assert origins(out) == ["accepted", "corrected"]
    assert session.epoch == 1


def test_an_empty_draft_still_commits_one_token() -> None:
    session = a_session()
    assert ids(session.on_verdict(verdict(publish(session), 20))) == [20]
    assert session.epoch == 0


def test_the_first_job_carries_the_whole_prompt_and_the_next_only_what_is_new() -> None:
    session = a_session()
    first = publish(session, 20)
    assert (first.offset, first.ids, first.base) == (0, PROMPT, 3)
    session.on_verdict(verdict(first, 20, 21))
    second = publish(session, 22)
    assert (second.offset, second.ids, second.base) == (3, (20, 21), 5)
    assert second.digest == History(TARGET, SAMPLING, [*PROMPT, 20, 21]).digest(5)


def test_a_round_either_drafts_or_continues() -> None:
    with pytest.raises(ValueError, match="either drafts or continues"):
        a_session().publish((20,), continues=3)


@pytest.mark.parametrize(("max_tokens", "window"), [(0, 1), (5, 0)])
def test_limits_under_which_nothing_could_ever_move_are_refused(max_tokens: int, window: int) -> None:
    with pytest.raises(ValueError, match="can never move"):
        Limits(max_tokens, window=window)


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one id"):
        Session.start("a" * 32, TARGET, SAMPLING, (), Limits(1), 100)


# --- which verdicts apply ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "counted"),
    [
        ({"epoch": 1}, "stale"),
        ({"digest": bytes(16)}, "stale"),
        ({"session": "b" * 32}, "stale"),
        ({"draws": (100,)}, "invalid"),
        ({"accepted": 4}, "invalid"),
        ({"base": 2}, "invalid"),
    ],
)
def test_a_verdict_that_is_not_of_this_history_changes_nothing(change: dict[str, Any], counted: str) -> None:
    session = a_session()
    job = publish(session, 20, 21)
    assert session.on_verdict(verdict(job, 20, 21, 22, **change)) == []
    assert getattr(session.counts, counted) == 1
    assert (session.committed, session.epoch, len(session.flight)) == (3, 0, 1)
    assert ids(session.on_verdict(verdict(job, 20, 21, 22))) == [20, 21, 22]


def test_a_doubled_verdict_is_a_duplicate_and_commits_nothing() -> None:
    session = a_session()
    said = verdict(publish(session, 20), 20, 21)
    session.on_verdict(said)
    assert session.on_verdict(said) == []
    assert session.counts.duplicate == 1


def test_of_two_disagreeing_verdicts_the_first_stands() -> None:
    session = a_session()
    job = publish(session, 20)
    assert ids(session.on_verdict(verdict(job, 20, 21))) == [20, 21]
    assert session.on_verdict(verdict(job, 20, 31)) == []
    assert session.counts.disagreed == 1
    assert list(session.generated) == [20, 21]
    assert session.epoch == 0, "the round had its answer; nothing is asked again"


def test_a_round_that_disagrees_with_what_is_committed_is_asked_afresh_at_once() -> None:
    session = a_session(window=2)
    first, second = publish(session, 20), publish(session, 21)
    session.on_verdict(verdict(first, 20, 21))
    assert session.on_verdict(verdict(second, 31)) == [], "another machine read position 4 differently"
    assert (session.epoch, session.flight) == (1, [])
    assert session.room() > 0, "no timer has to run out first"


def test_a_late_verdict_of_an_older_epoch_is_dropped() -> None:
    session = a_session()
    late = verdict(publish(session, 20), 20, 21)
    again = session.on_silence()
    assert again is not None
    assert session.on_verdict(late) == []
    assert ids(session.on_verdict(verdict(job_of(session, again), 20, 21))) == [20, 21]


# --- several rounds in flight --------------------------------------------------------------------------------


def test_the_agent_drafts_on_as_if_all_were_accepted() -> None:
    session = a_session(window=2)
    publish(session, 20, 21)
    second = publish(session, 22)
    assert session.assumed() == [*PROMPT, 20, 21, 22]
    assert (second.base, second.offset, second.ids) == (5, 3, (20, 21))
    assert second.digest == History(TARGET, SAMPLING, [*PROMPT, 20, 21]).digest(5)
    assert session.room() == 0


def test_a_bonus_token_that_equals_the_next_draft_overlaps_it() -> None:
    session = a_session(window=2)
    first, second = publish(session, 20, 21), publish(session, 22, 23)
    out = session.on_verdict(verdict(first, 20, 21, 22))
    assert origins(out) == ["accepted"] * 3
    assert session.assumed() == [*PROMPT, 20, 21, 22, 23]
    assert ids(session.on_verdict(verdict(second, 22, 23, 24))) == [23, 24], "22 was committed already"
    assert session.epoch == 0


def test_a_bonus_token_that_differs_from_the_next_draft_starts_a_new_epoch() -> None:
    session = a_session(window=2)
    first, second = publish(session, 20), publish(session, 21)
    assert origins(session.on_verdict(verdict(first, 20, 31))) == ["accepted", "corrected"]
    assert (session.epoch, session.flight) == (1, [])
    assert session.on_verdict(verdict(second, 21, 22)) == []


def test_a_verdict_ahead_waits_in_the_reorder_buffer() -> None:
    session = a_session(window=2)
    first, second = publish(session, 20, 21), publish(session, 22)
    assert session.on_verdict(verdict(second, 22, 23)) == []
    assert session.counts.reordered == 1
    assert ids(session.on_verdict(verdict(first, 20, 21, 22))) == [20, 21, 22, 23]
    assert session.flight == []


def test_a_correction_empties_the_reorder_buffer() -> None:
    session = a_session(window=2)
    first, second = publish(session, 20, 21), publish(session, 22)
    session.on_verdict(verdict(second, 22, 23))
    assert ids(session.on_verdict(verdict(first, 20, 31))) == [20, 31]


def test_a_full_worker_is_sent_one_round_at_a_time_until_it_has_room_again() -> None:
    session = a_session(window=3)
    session.on_verdict(verdict(publish(session, 20), 20, 21, credit=0))
    first = publish(session, 22)
    assert session.room() == 0
    session.on_verdict(verdict(first, 22, 23, credit=7))
    publish(session, 24)
    assert session.room() > 0


def test_the_reorder_buffer_holds_no_more_than_the_window_and_nothing_unasked() -> None:
    session = a_session(window=2)
    publish(session, continues=10)
    history = History(TARGET, SAMPLING, [*PROMPT, *range(20, 30)])
    chunk = verdict(job_of(session, session.flight[0]), 50, last=False)
    for base in range(5, 10):
        session.on_verdict(chunk.model_copy(update={"base": base, "digest": history.digest(base)}))
    assert session.counts.reordered == 2
    session.on_verdict(chunk.model_copy(update={"base": 9, "round": 77}))
    assert session.counts.reordered == 2


def test_a_forged_verdict_ahead_cannot_take_the_place_of_the_real_one() -> None:
    session = a_session(window=2)
    first, second = publish(session, 20), publish(session, 21)
    session.on_verdict(verdict(second, 21, 22, digest=bytes(16)))
    session.on_verdict(verdict(second, 21, 22))
    assert ids(session.on_verdict(verdict(first, 20, 21))) == [20, 21, 22]


def test_a_round_verified_only_in_part_ends_the_epoch_of_those_behind_it() -> None:
    session = a_session(window=2)
    first = publish(session, 20, 21, 22)
    publish(session, 23)
    assert ids(session.on_verdict(verdict(first, 20))) == [20]
    assert (session.epoch, session.flight) == (1, [])


def test_room_ends_where_the_flight_already_reaches_the_end_of_the_answer() -> None:
    session = a_session(max_tokens=3, window=4)
    assert session.room() == 3
    publish(session, 20)
    assert session.room() == 2
    publish(session, 21)
    assert session.room() == 0, "the bonus of the second round is the third token"


def test_nothing_is_drafted_behind_an_empty_draft_or_a_stop_id() -> None:
    session = a_session(window=4, stop_ids=frozenset({9}))
    publish(session)
    assert session.room() == 0
    session = a_session(window=4, stop_ids=frozenset({9}))
    publish(session, 9)
    assert session.room() == 0


# --- continuations -------------------------------------------------------------------------------------------


def chunks_of(session: Session, job: VerifyJob, *chunks: tuple[int, ...]) -> list[Verdict]:
    """A worker's answer in several messages, each with its own base and digest."""
    history, said = History(TARGET, SAMPLING, session.assumed()), list[Verdict]()
    for seq, draws in enumerate(chunks):
        base, last = len(history), seq == len(chunks) - 1
        said.append(verdict(job, *draws, seq=seq, last=last, base=base, digest=history.digest(base)))
        history.extend(draws)
    return said


def test_chunks_of_a_continuation_extend_each_other() -> None:
    session = a_session()
    one, two, three = chunks_of(session, publish(session, continues=4), (20,), (21, 22), (23, 24))
    assert [ids(session.on_verdict(said)) for said in (one, two, three)] == [[20], [21, 22], [23, 24]]
    assert session.flight == []


def test_a_peer_that_starts_a_continuation_again_overlaps_what_is_committed() -> None:
    session = a_session()
    job = publish(session, continues=4)
    dying = chunks_of(session, job, (20,), (21, 22), (23, 24))
    peer = chunks_of(session, job, (20,), (21, 22, 23), (24,))
    for said in dying[:2]:
        session.on_verdict(said)
    assert [ids(session.on_verdict(said)) for said in peer] == [[], [23], [24]]


def test_a_silent_continuation_is_asked_for_what_is_missing_with_all_its_resends() -> None:
    session = a_session()
    job = publish(session, continues=9)
    for _ in range(4):
        session.on_verdict(chunks_of(session, job, (20,), (21,))[0])
        again = session.on_silence()
        assert again is not None
        assert again.attempt == 1, "each time a chunk had come before the silence"
        job = job_of(session, again)
        assert job.base + 1 + job.continue_tokens == 3 + 10, "the end of what was asked stays where it was"


# --- silence, refusals, degradation --------------------------------------------------------------------------


def test_a_timer_resends_twice_and_then_gives_up() -> None:
    session = a_session()
    publish(session, 20)
    for attempt in (1, 2):
        again = session.on_silence()
        assert again is not None
        assert (again.attempt, again.draft, session.epoch) == (attempt, (20,), attempt)
        assert job_of(session, again).offset == 0, "whoever gets it may know nothing"
    assert session.on_silence() is None


def test_silence_keeps_only_what_is_still_ahead_of_the_oldest_draft() -> None:
    session = a_session(window=3)
    first = publish(session, 20)
    publish(session, 21, 22)
    publish(session, 23)
    session.on_verdict(verdict(first, 20, 21))
    again = session.on_silence()
    assert again is not None
    assert (again.base, again.draft, session.flight) == (5, (22,), [again])


def test_need_prefix_sends_the_round_once_more_from_the_first_id_in_the_same_epoch() -> None:
    session = a_session()
    session.on_verdict(verdict(publish(session, 20), 20, 21))
    job = publish(session, 22)
    assert job.offset == 3
    whole = session.on_need_prefix(job.round)
    assert whole is not None
    again = job_of(session, whole)
    assert (again.offset, again.ids, again.epoch, again.digest) == (0, (*PROMPT, 20, 21), 0, job.digest)
    assert session.on_need_prefix(job.round) is None, "it carried everything already"


def test_a_refusal_concerns_only_a_round_in_flight_in_this_epoch() -> None:
    session = a_session()
    job = publish(session, 20)
    refusal = Refusal(session=session.id, epoch=0, round=job.round, code="stale", worker="w")
    assert session.concerns(refusal)
    assert not session.concerns(refusal.model_copy(update={"session": "b" * 32}))
    session.on_silence()
    assert not session.concerns(refusal)


def test_after_a_correction_the_next_job_starts_where_both_sides_agree() -> None:
    session = a_session(window=2)
    first = publish(session, 20, 21)
    publish(session, 22)
    session.on_verdict(verdict(first, 31))
    job = publish(session, 32)
    assert (job.base, job.offset, job.ids) == (4, 4, ()), "the worker drew 31 itself"


def test_going_on_alone_abandons_the_flight_and_flags_its_tokens() -> None:
    session = a_session()
    late = verdict(publish(session, 20), 20, 21)
    assert origins(session.commit_local([40, 41])) == ["local", "local"]
    assert (session.epoch, session.flight) == (1, [])
    assert session.on_verdict(late) == []
    job = publish(session, 42)
    assert (job.base, job.offset, job.ids) == (5, 3, (40, 41)), "verified again, on the prefix as it now is"


# --- the end -------------------------------------------------------------------------------------------------


def test_a_stop_id_ends_the_answer_and_what_follows_it_is_cut() -> None:
    session = a_session(stop_ids=frozenset({21}))
    out = session.on_verdict(verdict(publish(session, 20, 21, 22), 20, 21, 22, 23))
    assert ids(out) == [20, 21]
    assert session.finish == "stop"
    assert session.flight == []


def test_the_last_token_ends_the_answer_exactly() -> None:
    session = a_session(max_tokens=2)
    assert ids(session.on_verdict(verdict(publish(session, 20, 21), 20, 21, 22))) == [20, 21]
    assert session.finish == "length"


def test_local_tokens_end_at_the_same_place() -> None:
    session = a_session(max_tokens=2)
    assert ids(session.commit_local([20, 21, 22])) == [20, 21]
    assert session.finish == "length"
    session = a_session(stop_ids=frozenset({20}))
    assert ids(session.commit_local([20, 21])) == [20]
    assert session.finish == "stop"


def test_nothing_is_committed_after_the_end() -> None:
    session = a_session()
    job = publish(session, 20)
    session.cancel()
    assert session.finish == "cancelled"
    assert session.on_verdict(verdict(job, 20, 21)) == []
    assert session.commit_local([20]) == []
    assert session.on_silence() is None
    assert session.room() == 0
