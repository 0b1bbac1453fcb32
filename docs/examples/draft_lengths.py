"""How long should a draft be, near the cloud and far from it? Three fixed lengths against the stop rule.

python docs/examples/draft_lengths.py out            # about three minutes; the same again goes on where it was
"""

import sys
from pathlib import Path

from pilotfish.bench import Experiment, load, run, write_report

LENGTHS = (2, 4, 8)
RTTS_MS = (0, 40)


def main(out: str, engine: str = "llamacpp", prompts: Path | None = None) -> None:
    """Measure, write the report, and print how fast each length is."""
    modes = [f"no_confidence+draft_tokens={length}" for length in LENGTHS]
    settings = {"engine": engine, "temperature": 0.7, "top_p": 0.9, "max_tokens": 48}
    sizes = {"seeds": 2, "per_family": 1, "lessons": 10}
    experiment = Experiment(Path(out), ",".join(modes), rtt_ms=RTTS_MS, prompts=prompts, settings=settings, **sizes)
    folder = run(experiment, progress=lambda done, total, what: print(f"{done}/{total} {what}", file=sys.stderr))
    data = load(folder)
    for rtt in data.rtts:
        for mode in data.variants:
            speed = data.interval(mode, rtt, "tokens_per_second")
            print(f"RTT {rtt:g} ms, {mode}: {speed.value:.0f} tokens/s, from {speed.low:.0f} to {speed.high:.0f}")
    print(write_report(folder))


if __name__ == "__main__":
    main(*sys.argv[1:3])
