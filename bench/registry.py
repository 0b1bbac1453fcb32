"""Which benchmarks there are. Nothing of a benchmark is imported before it runs."""

from __future__ import annotations

from importlib import import_module
from typing import Any, Final

from pilotfish.protocol.errors import UsageError

#: name -> "module:function"; the function takes `quick` and returns a Report
NAMES: Final[dict[str, str]] = {
    "exact": "pilotfish.bench.exact:run",
    "broker": "pilotfish.bench.broker:run",
    "verify": "pilotfish.bench.verify:run",
    "capacity": "pilotfish.bench.capacity:run",
    "edgecache": "pilotfish.bench.edgecache:run",
    "index": "pilotfish.bench.index:run",
    "routing": "pilotfish.bench.routing:run",
    "control": "pilotfish.bench.control:run",
    "gate": "pilotfish.bench.gate:run",
    "fleet": "pilotfish.bench.fleet:run",
    "chaos": "pilotfish.bench.chaos:run",
    "load": "pilotfish.bench.many_edges:run",
    "soak": "pilotfish.bench.soak:run",
}
SUMMARIES: Final[dict[str, str]] = {
    "exact": "exact mode against cloud_only, token by token, on every engine installed",
    "gate": "what the gate keeps on the device, at what loss, and whether its budget holds",
    "broker": "the queue's round trip against a bare stream echo and stock arq",
    "verify": "a warm round's rows and cost at 64, 1,000 and 3,000 tokens of context",
    "capacity": "committed tokens per second with 1 to 64 edges against plain decoding and vLLM's own speculation",
    "edgecache": "conversations kept on the device, against llama-cpp-python's RAM cache",
    "index": "the prefix index: memory, lookups and dead workers, against llm-d's and AIBrix's layouts",
    "routing": "sessions sent where their prefix is cached, against least-loaded routing and an oracle",
    "control": "the stop rule and pipelining against every fixed draft length, replayed and live",
    "fleet": "10 to 100,000 edges by simulation from measured costs: where each part saturates, what to shard first",
    "chaos": "texts stay right while workers, agents, Redis and messages are killed, stopped, cut off and doubled",
    "load": "256 edges on one Redis: overhead, growth with workers, overload, and a flood from one tenant",
    "soak": "memory, descriptors, metric series and keys after N minutes of steady load",
}


def run(name: str, quick: bool = False, **options: Any) -> dict[str, Any]:
    """One benchmark's report; `options` are those only it has. Raises UsageError for a name that is none."""
    if name not in NAMES:
        raise UsageError(f"there is no benchmark {name!r}: choose {', '.join(NAMES)}")
    module, _, function = NAMES[name].partition(":")
    report: dict[str, Any] = getattr(import_module(module), function)(quick=quick, **options).as_dict()
    return report
