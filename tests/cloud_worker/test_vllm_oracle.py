"""The verifier against an oracle that shares nothing with it: vLLM's public API a token at a time, and a scalar draw.

Plain decoding in the same engine would hide an offset that both share. The oracle is another process with none of our
hooks: it says the raw logits of all ids after a prefix, and the draw is `sampling_reference.py`, one id at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from contracts.tiny_hf import write_tiny_model
from contracts.verifier import SAMPLINGS, fresh, run

from pilotfish.bench import stock_child
from pilotfish.bench.engines import environment
from pilotfish.bench.piped import Piped
from pilotfish.cloud_worker.engines.base import VerifyRequest
from pilotfish.cloud_worker.engines.vllm_engine import VllmVerifier
from pilotfish.protocol.messages import Sampling
from pilotfish.protocol.sampling import perturbed
from pilotfish.protocol.sampling_reference import draw_reference

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed"),
]

VOCAB, CONTEXT, K = 512, 512, 6
TIE = 1e-3  # two float32 engines may part where the perturbed logits are this close, and only there


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("target"), vocab=VOCAB, context=CONTEXT)


@pytest.fixture(scope="module")
def oracle(model_dir: Path) -> Iterator[Piped]:
    settings = {
        "model": str(model_dir), "dtype": "float32", "max_model_len": CONTEXT, "enforce_eager": True,
        "skip_tokenizer_init": True, "logprobs_mode": "raw_logits", "max_logprobs": -1,
    }  # fmt: skip
    with Piped(stock_child.MODULE, environment()) as child:
        child.ask({"do": "open", "cores_": "", "threads": 1, "settings": settings})
        yield child


@pytest.fixture(scope="module")
def engine(model_dir: Path) -> Iterator[VllmVerifier]:
    verifier = VllmVerifier(model_dir, context=CONTEXT, draft_max=K, max_sessions=8, threads=1, kv_blocks=64)
    yield verifier
    verifier.close()


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
@pytest.mark.parametrize("length", [1, 31, 32, 33, 90])
def test_every_row_of_every_round_is_the_oracles_draw(
    engine: VllmVerifier, oracle: Piped, sampling: Sampling, length: int
) -> None:
    """Drafts right, wrong and absent, in one resident session: each draw is that of the definition at its position."""
    ids, session = [(7 * i + 3) % VOCAB for i in range(length)], fresh()
    for drafted in (0, K, 2, K):
        request = VerifyRequest(fresh("r"), session, list(ids), truth(oracle, ids, drafted, sampling), sampling)
        request.draft[3:] = [(token + 1) % VOCAB for token in request.draft[3:]]
        (event,) = run(engine, request)[request.request_id]
        for draw in event.draws:
            check(draw, oracle.ask({"do": "logits", "prefixes": [ids]})[0], len(ids), sampling)
            ids.append(draw)
        assert event.accepted == min(drafted, 3)


def truth(oracle: Piped, ids: list[int], count: int, sampling: Sampling) -> list[int]:
    """What the oracle itself writes after `ids`."""
    text = list(ids)
    for _ in range(count):
        (row,) = oracle.ask({"do": "logits", "prefixes": [text]})
        text.append(draw_reference(row, len(text), sampling))
    return text[len(ids) :]


def check(drawn: int, row: list[float], position: int, sampling: Sampling) -> None:
    right = draw_reference(row, position, sampling)
    if drawn != right:
        scores = perturbed(np.array([row], np.float32), np.array([position]), sampling)[0]
        assert abs(scores[drawn] - scores[right]) < TIE, (drawn, right)
