"""From settings to a running agent: open the draft model, find the target, check the pair.

The one place of the device's side that reads settings; everything below takes plain values. Raises the error tree's
sentences: no Redis, no worker, a model file that is none, a pair that does not fit.
"""

from __future__ import annotations

import re
import secrets
import socket
from pathlib import Path
from typing import TYPE_CHECKING

from pilotfish.cache.hub_fetch import model_path
from pilotfish.cache.presets import with_preset
from pilotfish.edge_agent.agent import Agent, Defaults, new_boot
from pilotfish.edge_agent.confidence import Ensemble, strategy
from pilotfish.edge_agent.learned import Store
from pilotfish.edge_agent.learning import Learner
from pilotfish.edge_agent.tokenizer import LlamaTokenizer
from pilotfish.protocol import cores, fleet
from pilotfish.protocol.broker import EdgeBroker, connect, ping
from pilotfish.protocol.messages import Sampling
from pilotfish.protocol.settings import Settings

if TYPE_CHECKING:
    from pilotfish.cache.edge_cache import EdgeCache
    from pilotfish.cache.state_folder import StateFolder
    from pilotfish.edge_agent.drafters.llamacpp import LlamaCppDrafter

SESSIONS = 4  # sequences of the draft's context; more generations take turns


async def open_agent(settings: Settings, redis_url: str | None) -> Agent:
    """An agent that is ready to `start()`; without a URL it serves `edge_only` alone."""
    if redis_url is None:
        drafter = open_drafter(settings)
        tokenizer = LlamaTokenizer(drafter.model)
        stops = sorted(drafter.model.eog_ids)
        return Agent(drafter, tokenizer, stops, defaults=_defaults(settings), learner=_learner(settings, drafter))
    redis = connect(redis_url)
    try:
        await ping(redis, redis_url)
        target = await fleet.find_target(redis, settings.target or "")
        drafter = open_drafter(settings)
        ours = fleet.Vocabulary(tuple(drafter.model.token_bytes))
        fleet.check_pair(ours, target.vocabulary, (f"draft {drafter.info.model}", f"target {target.name}"))
    except BaseException:
        await redis.aclose()
        raise
    stop_ids = drafter.model.eog_ids.union(target.vocabulary.stop_ids)
    name = settings.agent or default_name()
    broker = EdgeBroker(redis, settings.tenant, name, new_boot(), padded=settings.pad_messages)
    tokenizer = LlamaTokenizer(drafter.model, target.vocabulary.chat_template)
    learner = _learner(settings, drafter, target.id)
    return Agent(drafter, tokenizer, sorted(stop_ids), broker, target, _defaults(settings), learner)


def open_drafter(settings: Settings) -> LlamaCppDrafter:
    """The draft model the settings name, else the demo's. Raises ModelError."""
    from pilotfish.edge_agent.drafters.llamacpp import LlamaCppDrafter

    chosen = strategy(settings.strategy, switched_off(settings))
    cores.bind(settings.cores)
    threads = settings.draft_threads or len(cores.available())
    path = draft_path(settings)
    cache = edge_cache(settings, path)
    return LlamaCppDrafter(
        path, context=settings.context, sessions=SESSIONS, threads=threads, confidence=chosen.score, cache=cache,
        resident=settings.kv_reuse,
    )  # fmt: skip


def edge_cache(settings: Settings, draft: Path) -> EdgeCache | None:
    """What the settings allow of saved draft states: in memory, on disk too, or none at all."""
    from pilotfish.cache.edge_cache import EdgeCache

    if not (settings.kv_reuse and settings.edge_cache_mb):
        return None
    folder = state_folder(settings, draft) if settings.edge_cache_disk_mb else None
    return EdgeCache(int(settings.edge_cache_mb * 1e6), folder)


def state_folder(settings: Settings, draft: Path) -> StateFolder:
    """The draft's saved states on disk. Raises ModelError if there is no such draft."""
    from pilotfish.cache.model_build import ModelBuild
    from pilotfish.cache.state_folder import StateFolder
    from pilotfish.edge_agent.drafters.llamacpp import KV

    return StateFolder(
        states_path(settings), ModelBuild.of(draft, KV), model=draft.stem, context=settings.context,
        budget_bytes=int(settings.edge_cache_disk_mb * 1e6),
    )  # fmt: skip


def states_path(settings: Settings) -> Path:
    """The folder of saved draft states, which need not exist."""
    from pilotfish.demo.pair import cache_dir

    return (settings.cache_dir or cache_dir()) / "kv"


def switched_off(settings: Settings) -> list[str]:
    """Names of the strategies that are not used."""
    return [name for name in settings.strategies_off.split(",") if name]


def _learner(settings: Settings, drafter: LlamaCppDrafter, target: str = "") -> Learner:
    return Learner(drafter.info.fingerprint, target, strategy_name(settings), Store(learned_folder(settings)))


def strategy_name(settings: Settings) -> str:
    """The name under which scores are learnt; an ensemble of other members gives other scores."""
    off = sorted(switched_off(settings)) if settings.strategy == Ensemble.name else []
    return "-".join([settings.strategy, *(f"no_{one}" for one in off)])


def learned_folder(settings: Settings) -> Path:
    """Where calibration is kept."""
    from pilotfish.demo.pair import cache_dir

    return (settings.cache_dir or cache_dir()) / "learned"


def draft_path(settings: Settings) -> Path:
    """GGUF file of the draft; the demo's is converted at first use, one on a hub is fetched."""
    from pilotfish.demo.pair import draft_gguf, fetched_dir

    named = with_preset(settings).draft_model
    if not named:
        return draft_gguf()
    return model_path(named, fetched_dir(settings.cache_dir), offline=settings.offline)


def default_name() -> str:
    """A device's name made from its host name; several agents of one host differ in the tail."""
    host = re.sub(r"[^A-Za-z0-9_.-]", "-", socket.gethostname())[:40]
    return f"{host or 'edge'}-{secrets.token_hex(2)}"


def sampling(settings: Settings) -> Sampling:
    """The draw's parameters; a request without a seed gets a random one, which the answer states."""
    seed = secrets.randbits(64) if settings.seed is None else settings.seed
    return Sampling(
        temperature=settings.temperature, top_k=settings.top_k, top_p=settings.top_p, min_p=settings.min_p, seed=seed
    )


def _defaults(settings: Settings) -> Defaults:
    return Defaults(
        drafting=settings.drafting,
        draft_tokens=settings.draft_tokens,
        window=settings.window,
        resends=settings.resends,
        round_timeout_ms=settings.round_timeout_ms,
        max_disagreement=settings.max_disagreement,
        audit_share=settings.audit_share,
    )
