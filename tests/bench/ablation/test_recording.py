"""What the pen writes down: every job and its verdict become one round."""

from __future__ import annotations

from rigs import BOOT, draws, job

from pilotfish.bench.ablation.recording import Notes, RecordingDrafter
from pilotfish.edge_agent.drafters.base import Draft
from pilotfish.edge_agent.drafters.fake import FakeDrafter
from pilotfish.protocol.codec import encode
from pilotfish.protocol.messages import Close, Refusal, Sampling, Verdict

SESSION = "0" * 32


def half(confidence: float) -> float:
    return confidence / 2


def verdict(**changes: object) -> Verdict:
    made = {
        "boot": BOOT, "session": SESSION, "epoch": 0, "round": 0, "base": 16, "digest": b"\0" * 16, "draws": (1, 2),
        "accepted": 1, "worker": "w1", "rows": 18, "steps": 1, "cached": 3, "engine_ms": 2.0, "queue_ms": 0.5,
    }  # fmt: skip
    return Verdict.model_validate({**made, **changes})


def test_a_job_and_its_verdict_are_one_round() -> None:
    notes, sent, reply = Notes(half), job(job().ids, (1, 7)), verdict()
    notes.drafted(16, Draft([1, 7], [0.9, 0.4]))
    notes.sent(sent)
    notes.heard(reply)
    (one,) = notes.rounds
    assert (one["drafted"], one["accepted"], one["confidences"], one["sends"]) == (2, 1, [0.9, 0.4], 1)
    assert one["estimates"] == [0.45, 0.2]
    assert (one["rows"], one["steps"], one["cached"], one["engine_ms"]) == (18, 1, 3, 2.0)
    assert (one["job_bytes"], one["reply_bytes"]) == (len(encode(sent)), len(encode(reply)))
    assert 0 <= one["sent_ms"] <= one["answered_ms"]


def test_a_confidence_is_that_of_the_draft_that_was_sent() -> None:
    notes = Notes(half)
    notes.drafted(16, Draft([1, 7], [0.9, 0.4]))
    notes.drafted(17, Draft([8], [0.6]))
    notes.sent(job(job().ids, (1, 8, 9)))
    assert notes.rounds[0]["confidences"] == [0.9, 0.6, None]


def test_chunks_add_up_and_a_repeat_is_the_same_round() -> None:
    notes, sent = Notes(half), job(job().ids, (), continue_tokens=3)
    notes.sent(sent)
    notes.sent(sent)
    notes.heard(verdict(accepted=0, last=False))
    notes.heard(verdict(accepted=0, seq=1, base=18, rows=2))
    (one,) = notes.rounds
    assert (one["sends"], one["rows"], one["steps"]) == (2, 20, 2)


def test_a_refusal_is_noted_and_what_belongs_to_no_round_is_not() -> None:
    notes = Notes(half)
    notes.sent(job())
    notes.heard(Refusal(session=SESSION, code="need_prefix", worker="w1"))
    notes.heard(verdict(round=9))
    notes.heard(verdict(session="1" * 32))
    note = Close(agent="edge1", boot=BOOT, session=SESSION)
    notes.sent(note)
    (one,) = notes.rounds
    assert (one["refused"], one["accepted"]) == ("need_prefix", None)
    assert notes.other_bytes == len(encode(note))
    notes.begin()
    assert notes.rounds == []


def test_a_drafter_with_a_pen_drafts_the_same() -> None:
    def target(ids: object, position: int, sampling: Sampling) -> int:
        return draws(list(ids), 1)[0]  # type: ignore[call-overload]

    notes, prompt = Notes(half), list(job().ids)
    drafter = RecordingDrafter(FakeDrafter(target, alpha=1.0), notes)
    drafted = drafter.draft("s", prompt, 3, Sampling())
    notes.sent(job(prompt, drafted.ids))
    assert drafted.ids == draws(prompt, 3)
    assert notes.rounds[0]["confidences"] == drafted.confidences
