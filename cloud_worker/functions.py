"""The functions arq knows by name, one for each type of message: what a worker does with a job.

`job_tasks.py` calls them, `routing.py` may pass a job on before, `verify.py` answers it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from arq.worker import func

from pilotfish.cloud_worker.routing import PassedOn
from pilotfish.cloud_worker.verify import Ticket
from pilotfish.protocol import tracing
from pilotfish.protocol.delivery import Delivery
from pilotfish.protocol.ingress import Ingress
from pilotfish.protocol.messages import Cancel, Close, Message, ScoreJob, VerifyJob


async def verify(ctx: dict[str, Any], job: VerifyJob | ScoreJob) -> None:
    """One verify or score job: replies or a refusal, the last one in the transaction that acknowledges it."""
    delivery: Delivery = ctx["delivery"]
    ingress: Ingress = ctx["worker"].ingress
    # an entry's id is unique within its stream only, and the engine knows requests of every stream
    request_id = f"{delivery.stream} {delivery.entry_id}/{delivery.deliveries}"
    verification, router = ctx["verification"], ctx["worker"].router
    ticket, start = Ticket(delivery.tenant, job, ingress.age_ms(delivery), request_id), None
    if router and (delivery.hops or verification.admits(ticket)):  # what is refused reserves no place at a peer
        try:
            start = await router.place(delivery, job)
        except PassedOn:
            return

    outcome = "none"

    async def answer(message: Message, last: bool) -> None:
        nonlocal outcome
        outcome = getattr(message, "code", "verdict")
        await ingress.reply(delivery, message, last=last)

    trace = job.trace if isinstance(job, VerifyJob) else ""
    tracing.past("queue", trace, max(0, ticket.age_ms), deliveries=delivery.deliveries)
    span = tracing.Span("verify", trace, worker=ingress.worker, draft=len(job.draft))
    try:
        with ingress.under_way(delivery.tenant, job):
            await verification.handle(replace(ticket, start=start, trace=span.context), answer)
    finally:
        span.end(outcome=outcome)
        if start:
            start.close()


async def cancel(ctx: dict[str, Any], message: Cancel | Close) -> None:
    """Stop what runs for a session (cancel), and forget it (close); acknowledged without a reply."""
    delivery: Delivery = ctx["delivery"]
    if router := ctx["worker"].router:
        try:
            await router.follow(delivery, message)
        except PassedOn:
            return
    closing = isinstance(message, Close)
    await ctx["verification"].cancel(delivery.tenant, message.agent, message.session, close=closing)
    await ctx["worker"].ingress.reply(delivery, None)


FUNCTIONS = (
    func(verify, name="verify", max_tries=1),
    func(verify, name="score", max_tries=1),
    func(cancel, name="cancel", max_tries=1),
    func(cancel, name="close", max_tries=1),
)
