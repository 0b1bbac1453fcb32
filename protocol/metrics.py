"""Every metric, one page: Prometheus names, labels, meaning. Labels are bounded: never a session, agent or tenant.

    side    name                                          labels       what it counts
    worker  pilotfish_jobs_total                          outcome      jobs answered: "verdict" or the refusal's code
    worker  pilotfish_committed_tokens_total              -            draws asserted by verdicts
    worker  pilotfish_engine_rows_total                   -            positions the engine computed for them
    worker  pilotfish_engine_steps_total                  -            forward passes they took part in
    worker  pilotfish_engine_restarts_total               -            engine child processes started again
    worker  pilotfish_routes_total                        outcome      session starts: kept, passed_on, stolen
    worker  pilotfish_predictions_total                   outcome      predicted cached tokens: equal, too_much ...
    worker  pilotfish_index_errors_total                  -            times the prefix index failed; jobs were kept
    worker  pilotfish_queue_seconds                       -            age of a job when its turn came, on Redis' clock
    worker  pilotfish_verify_seconds                      -            from a job's turn to its verdict
    edge    pilotfish_tokens_total                        origin       committed tokens by who wrote them
    edge    pilotfish_verdicts_total                      fate         verdicts: applied, stale, duplicate ...
    edge    pilotfish_resends_total                       -            rounds published again
    edge    pilotfish_generations_total                   outcome      finish reason, or the error's code
    edge    pilotfish_degraded_total                      -            generations that went on without the cloud
    edge    pilotfish_edge_cache_lookups_total            outcome      drafts that began without their KV: hit, miss
    edge    pilotfish_edge_cache_saved_tokens_total       -            tokens restored instead of computed
    edge    pilotfish_edge_cache_evictions_total          -            saved states dropped for room in memory
    edge    pilotfish_edge_cache_bytes                    -            memory of the saved states
    edge    pilotfish_audited_tokens_total                -            gated tokens that an audit labelled
    edge    pilotfish_audit_disagreements_total           -            those of them where the target drew another
    edge    pilotfish_gate_alarms_total                   -            gates shut because audits passed the budget

Counting is in process and free of I/O; who serves the page is not known here.
"""

from __future__ import annotations

from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

REGISTRY: Final = CollectorRegistry()
_SECONDS: Final = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)

# worker
JOBS: Final = Counter("pilotfish_jobs", "Jobs answered", ["outcome"], registry=REGISTRY)
COMMITTED: Final = Counter("pilotfish_committed_tokens", "Draws asserted by verdicts", registry=REGISTRY)
ROWS: Final = Counter("pilotfish_engine_rows", "Positions the engine computed", registry=REGISTRY)
STEPS: Final = Counter("pilotfish_engine_steps", "Forward passes of the engine", registry=REGISTRY)
RESTARTS: Final = Counter("pilotfish_engine_restarts", "Engine processes started again", registry=REGISTRY)
ROUTES: Final = Counter("pilotfish_routes", "Session starts by where they went", ["outcome"], registry=REGISTRY)
PREDICTIONS: Final = Counter("pilotfish_predictions", "Predicted cached tokens", ["outcome"], registry=REGISTRY)
INDEX_ERRORS: Final = Counter("pilotfish_index_errors", "Failures of the prefix index", registry=REGISTRY)
QUEUE_SECONDS: Final = Histogram(
    "pilotfish_queue_seconds", "Age of a job when its turn came", buckets=_SECONDS, registry=REGISTRY
)
VERIFY_SECONDS: Final = Histogram(
    "pilotfish_verify_seconds", "From a job's turn to its verdict", buckets=_SECONDS, registry=REGISTRY
)

# edge
TOKENS: Final = Counter("pilotfish_tokens", "Committed tokens by origin", ["origin"], registry=REGISTRY)
VERDICTS: Final = Counter("pilotfish_verdicts", "Verdicts by what became of them", ["fate"], registry=REGISTRY)
RESENDS: Final = Counter("pilotfish_resends", "Rounds published again", registry=REGISTRY)
GENERATIONS: Final = Counter("pilotfish_generations", "Generations by outcome", ["outcome"], registry=REGISTRY)
DEGRADED: Final = Counter("pilotfish_degraded", "Generations that went on without the cloud", registry=REGISTRY)
LOOKUPS: Final = Counter(
    "pilotfish_edge_cache_lookups", "Drafts that began without their KV", ["outcome"], registry=REGISTRY
)
SAVED_TOKENS: Final = Counter(
    "pilotfish_edge_cache_saved_tokens", "Tokens restored instead of computed", registry=REGISTRY
)
EVICTIONS: Final = Counter("pilotfish_edge_cache_evictions", "Saved states dropped for room", registry=REGISTRY)
CACHE_BYTES: Final = Gauge("pilotfish_edge_cache_bytes", "Memory of the saved states", registry=REGISTRY)
AUDITED: Final = Counter("pilotfish_audited_tokens", "Gated tokens that an audit labelled", registry=REGISTRY)
AUDIT_DISAGREED: Final = Counter(
    "pilotfish_audit_disagreements", "Audited tokens the target would have drawn otherwise", registry=REGISTRY
)
GATE_ALARMS: Final = Counter("pilotfish_gate_alarms", "Gates shut by their audits", registry=REGISTRY)
