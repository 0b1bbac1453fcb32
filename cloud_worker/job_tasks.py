"""One job in a worker: a task of arq's that calls the function of the message's type, and a refusal where that fails.

The lower layer of `worker.py`. Every delivery is answered, or its lease is left to run out; nothing is dropped. Knows
arq's tasks and the broker; not where deliveries come from.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import replace
from typing import Any

import redis.exceptions as rx
from arq.worker import Worker

from pilotfish.cloud_worker.arq_pool import refuse_pickle
from pilotfish.cloud_worker.verify import AHEAD_MS
from pilotfish.protocol import keys, metrics
from pilotfish.protocol.codec import decode
from pilotfish.protocol.delivery import Delivery
from pilotfish.protocol.errors import BrokerError, InvalidMessage
from pilotfish.protocol.ingress import Ingress
from pilotfish.protocol.messages import Refusal, RefusalCode, ScoreJob, ToWorker, VerifyJob

log = logging.getLogger("pilotfish.worker")


class JobTasks(Worker):
    """An arq Worker that answers deliveries of `ingress`; `functions` are named after message types ("verify")."""

    def __init__(self, functions: Any, *, ingress: Ingress, **kwargs: Any) -> None:
        refuse_pickle(kwargs)
        super().__init__(functions, queue_name=f"arq:{keys.PREFIX}:{ingress.target}", **kwargs)
        self.ingress = ingress

    @property
    def credit(self) -> int:
        """Jobs this worker would take now."""
        return max(0, self.max_jobs - self.job_counter) if self.allow_pick_jobs else 0

    def credit_of(self, tenant: str) -> int:
        """Jobs it would take now from this tenant."""
        return 0 if self.ingress.usage.over(tenant) else self.credit

    def begin(self, delivery: Delivery) -> None:
        """Run one delivery as a task of arq's, so that time-outs, drain and counters see it."""
        name = f"{delivery.stream} {delivery.entry_id}"
        self.job_counter += 1
        metrics.RUNNING.set(self.job_counter)
        task = self.loop.create_task(self._run(delivery))
        self.tasks[name] = task
        task.add_done_callback(lambda _: self._ended(name))

    def _ended(self, name: str) -> None:
        self.job_counter -= 1
        metrics.RUNNING.set(self.job_counter)
        self.tasks.pop(name, None)

    async def _run(self, delivery: Delivery) -> None:
        """Every job gets a reply; one whose reply cannot be sent keeps its lease until it runs out."""
        try:
            await self._answer(delivery)
        except asyncio.CancelledError:
            self.ingress.release(delivery)
            raise
        except (rx.RedisError, BrokerError) as error:
            self.jobs_retried += 1
            self.ingress.release(delivery)
            log.warning("a reply could not be sent (%s): the job will be delivered again", error)
        except Exception:
            self.jobs_failed += 1
            self.ingress.release(delivery)  # or its lease would be renewed for ever
            log.exception("a job could not be answered: it will be delivered again")

    async def _answer(self, delivery: Delivery) -> None:
        invented = self.ingress.age_ms(delivery) < -AHEAD_MS
        await self._decode_and_answer(delivery)
        if invented:
            await self.ingress.start_over(delivery.stream)

    async def _decode_and_answer(self, delivery: Delivery) -> None:
        try:
            message: ToWorker = decode(delivery.payload, ToWorker)
        except InvalidMessage as error:
            await self._refuse(delivery, None, "invalid_message", str(error), dead=True)
            return
        delivery = replace(delivery, agent=delivery.agent or message.agent)
        if delivery.deliveries > keys.DELIVERIES_MAX:
            sentence = f"given up after {keys.DELIVERIES_MAX} deliveries"
            await self._refuse(delivery, message, "dead_letter", sentence, dead=True)
            return
        await self._call(delivery, message)

    async def _call(self, delivery: Delivery, message: ToWorker) -> None:
        function = self.functions[message.type]
        seconds = function.timeout_s or self.job_timeout_s
        try:
            async with asyncio.timeout(seconds):
                await function.coroutine({**self.ctx, "worker": self, "delivery": delivery}, message)
            self.jobs_complete += 1
        except (rx.RedisError, BrokerError):
            raise
        except TimeoutError:
            await self._refuse(delivery, message, "engine_failed", f"no answer within {seconds:g} s")
        except Exception as error:
            log.exception("a %s job raised", message.type)
            await self._refuse(delivery, message, "engine_failed", f"{type(error).__name__}: {error}")

    async def _refuse(
        self, delivery: Delivery, message: ToWorker | None, code: RefusalCode, sentence: str, *, dead: bool = False
    ) -> None:
        self.jobs_failed += 1
        job = message if isinstance(message, VerifyJob | ScoreJob) else None
        worker, credit = self.ingress.worker, self.credit_of(delivery.tenant)
        refusal = Refusal.of(job, code, sentence, worker=worker, credit=credit)
        await self.ingress.reply(delivery, refusal, dead=code if dead else "")
