"""An agent that starts: what it learns of the target, and which target it will not draft for."""

from __future__ import annotations

from pathlib import Path

import pytest
from contracts.tiny_gguf import write_tiny_gguf
from redis.asyncio import Redis

from pilotfish.cache.llama_context import LlamaModel
from pilotfish.edge_agent.launch import open_agent
from pilotfish.protocol import fleet, keys
from pilotfish.protocol.errors import PairMismatch
from pilotfish.protocol.settings import Settings

pytestmark = pytest.mark.llamacpp
TEMPLATE = "{% for message in messages %}<{{ message.content }}>{% endfor %}"


@pytest.fixture(scope="module")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_gguf(tmp_path_factory.mktemp("model") / "tiny.gguf")


@pytest.fixture
def tokens(model_file: Path) -> list[bytes]:
    with LlamaModel(model_file, vocab_only=True) as model:
        return list(model.token_bytes)


async def announced(redis: Redis, tokens: list[bytes]) -> None:
    """A live target that reads its ids so."""
    target = fleet.Target("0123456789abcdef", "shark", 512, 8, fleet.Vocabulary(tuple(tokens), TEMPLATE, (5,)))
    await fleet.announce(redis, target)
    seconds, _ = await redis.time()
    await redis.zadd(keys.workers(target.id), {"w1": seconds * 1000})
    await redis.pexpire(keys.workers(target.id), keys.JOBS_TTL_MS)


async def test_template_and_stop_ids_are_the_targets(
    redis: Redis, redis_url: str, model_file: Path, tmp_path: Path, tokens: list[bytes]
) -> None:
    await announced(redis, [*tokens, b"[PAD0]"])  # a target's table may be longer by padding
    agent = await open_agent(Settings(draft_model=model_file, context=512, cache_dir=tmp_path), redis_url)
    try:
        assert agent.target is not None
        assert (agent.target.name, agent.target.vocabulary.chat_template) == ("shark", TEMPLATE)
        assert 5 in agent.stop_ids
    finally:
        await agent.stop()


async def test_a_target_that_reads_an_id_otherwise_is_refused_at_start(
    redis: Redis, redis_url: str, model_file: Path, tmp_path: Path, tokens: list[bytes]
) -> None:
    await announced(redis, [*tokens[:300], b" shark", *tokens[301:]])
    with pytest.raises(PairMismatch, match=r"draft .* and target shark differ at token 300: .* against ' shark'"):
        await open_agent(Settings(draft_model=model_file, context=512, cache_dir=tmp_path), redis_url)
