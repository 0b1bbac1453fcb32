"""The report's standing words: what each plot shows, how figures are made, and what none of them says."""

from __future__ import annotations

from typing import Final

#: plot -> (heading, caption)
CAPTIONS: Final[dict[str, tuple[str, str]]] = {
    "latency": (
        "Latency",
        "Distribution over requests, prompt and tokenizer included. Accepted drafts arrive together, so the time per "
        "further token is that of the whole answer after its first token.",
    ),
    "throughput": (
        "Throughput",
        "Tokens over the time to the last one, one request at a time; whiskers are 95 % intervals, the dotted line is "
        "the baseline. What many sessions get out of one worker is another question: `pilotfish bench capacity`.",
    ),
    "rtt": (
        "Speed against RTT",
        "Straight lines between the RTTs measured, shaded 95 % intervals; vertical lines are where the baseline and "
        "another mode are equally fast.",
    ),
    "pareto": (
        "Accuracy against cloud rows",
        "Up and left is better; nobody is both left of and above the frontier. A row is one position of one forward "
        "pass of the target, the prompt's included.",
    ),
    "confidence": (
        "Confidence",
        "Drafts the target judged, at all RTTs together. Raw is the strategy's own score, calibrated what all verdicts "
        "before had taught to expect of it. Points above the diagonal are underconfident, below it overconfident. "
        "ECE: expected calibration error, ten bins of equal width. A gate sends only what it is unsure of, so the "
        "drafts judged there are a harder sample than all drafts.",
    ),
    "positions": (
        "Acceptance by position in the draft",
        "Of the drafts the target judged at that place: everything before them had been accepted.",
    ),
    "corrections": (
        "Where the target overrules the draft",
        "Corrected tokens over all tokens that stand at this place of an answer, in stretches of eight.",
    ),
    "wire": (
        "Bytes on the wire",
        "Everything between agent and Redis, Redis' protocol included, as the proxy counted it.",
    ),
    "cost": (
        "Cost",
        "At the prices given. Engine time is that of one request at a time; shared steps are cheaper, so this is an "
        "upper bound for the cloud.",
    ),
}

LIMITS: Final = (
    "One request at a time: no batching across sessions, no contention, no queueing. The proxy delays; it neither "
    "loses nor limits. All processes share one machine, so the device is as fast as the cloud. Intervals are over "
    "prompts and seeds, not over machines or models: another pair has other figures. They are not corrected for how "
    'many there are, so of a hundred comparisons between equals about five will not say "no difference".'
)
METHOD: Final = (
    "Variants take turns prompt by prompt, with the same seeds; agents start anew for every seed. Every figure is a "
    "ratio of sums over requests. Intervals are 95 % percentile intervals of a two-way bootstrap over prompts and "
    "seeds (2,000 resamples); comparisons are paired: the same prompts and seeds on both sides. "
    '"No difference" means that the interval holds equality. A request that failed counts as a wrong answer and in '
    "no other figure."
)
