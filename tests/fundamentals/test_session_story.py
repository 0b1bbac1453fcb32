"""One generation, told step by step: what the edge sends, what a verdict may change, and what nothing can break.

The target here is a hash of the prefix. Read `test_coupled_draw.py` first: every token is the target's own draw at its
position, so whoever computes it, and however often, it is the same token.
"""

from __future__ import annotations

from collections.abc import Sequence

from pilotfish.cloud_worker.engines.fake import VOCAB, fake_target
from pilotfish.edge_agent.session import Limits, Round, Session
from pilotfish.protocol.history import History
from pilotfish.protocol.messages import Sampling, Verdict, VerifyJob

SAMPLING = Sampling(temperature=0.7, seed=42)
PROMPT = (5, 6, 7)


def target_writes(ids: Sequence[int], count: int) -> list[int]:
    """What the target alone would go on with."""
    out = list(ids)
    while len(out) < len(ids) + count:
        out.append(fake_target(out, len(out), SAMPLING))
    return out[len(ids) :]


def verify(job: VerifyJob, known: Sequence[int] = ()) -> Verdict:
    """A worker: one pass over prefix and draft; draws up to and including the first that the draft did not foresee."""
    prefix = [*known[: job.offset], *job.ids]
    assert History("target", job.sampling, prefix).digest(job.base) == job.digest, "the job speaks of this history"
    draws = target_writes(prefix, len(job.draft) + 1)
    right = next((i for i, drafted in enumerate(job.draft) if drafted != draws[i]), len(job.draft))
    asked = job.model_dump(include={"boot", "session", "epoch", "round", "base", "digest"})
    return Verdict(**asked, draws=tuple(draws[: right + 1]), accepted=right, worker="w", credit=1)


def test_the_life_of_a_generation() -> None:
    session = Session.start("0" * 32, "target", SAMPLING, PROMPT, Limits(max_tokens=8, window=2), VOCAB)
    truth = target_writes(PROMPT, 8)

    def send(flying: Round) -> VerifyJob:
        return session.job(flying, agent="phone", boot="b", deadline_ms=1000)

    # A small model drafts two tokens, both right. The job carries the prompt, because nobody has seen it yet.
    first = send(session.publish(truth[:2]))
    assert (first.base, first.ids, first.draft) == (3, PROMPT, tuple(truth[:2]))

    # While the verdict is away it drafts on, as if all were accepted. This time it guesses wrong.
    second = send(session.publish([truth[2], truth[3] + 1]))
    assert second.ids == first.draft, "only what the worker has not been sent"

    # The second verdict comes first, and waits: what lies before it is not final.
    assert session.on_verdict(verify(second, known=PROMPT)) == []

    # The first one commits the draft and a bonus token, the target's next draw; then the second joins on.
    tokens = session.on_verdict(verify(first))
    assert [token.id for token in tokens] == truth[:4]
    assert [token.origin for token in tokens] == ["accepted", "accepted", "accepted", "corrected"]

    # A correction ends the epoch: whatever else was drafted rested on a token that is not there.
    assert (session.epoch, session.flight) == (1, [])
    assert session.on_verdict(verify(first)) == [], "late and doubled verdicts change nothing"

    # The worker dies. A timer fires, the round is sent again in a new epoch, whole, so that anyone can answer it.
    lost = send(session.publish([truth[4] + 1]))
    again = session.on_silence()
    assert again is not None
    assert (send(again).offset, send(again).epoch) == (0, lost.epoch + 1)
    assert [token.id for token in session.on_verdict(verify(send(again)))] == [truth[4]], "one token at the very least"

    # The draft was wrong twice and the cloud was lost once; the text is the target's own.
    session.on_verdict(verify(send(session.publish(truth[5:7])), known=[*PROMPT, *truth[:5]]))
    assert list(session.generated) == truth
    assert session.finish == "length"
