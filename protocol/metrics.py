"""Every metric, one page: Prometheus names, labels, meaning. Labels are bounded: never a session, agent or tenant.

    side    name                                          labels       what it counts
    both    pilotfish_num_requests_running                -            generations here, jobs at a worker
    both    pilotfish_num_requests_waiting                -            requests in line here, jobs waiting for a turn
    both    pilotfish_http_requests_total                 route,status requests to this process' HTTP server
    worker  pilotfish_jobs_total                          outcome      jobs answered: "verdict" or the refusal's code
    worker  pilotfish_committed_tokens_total              -            draws asserted by verdicts
    worker  pilotfish_engine_rows_total                   -            positions the engine computed for them
    worker  pilotfish_engine_steps_total                  -            forward passes they took part in
    worker  pilotfish_engine_restarts_total               -            engine child processes started again
    worker  pilotfish_shed_jobs_total                     outcome      jobs refused unread: expired, stale, overloaded
    worker  pilotfish_trimmed_jobs_total                  -            jobs dropped unread: a stream over its bound
    worker  pilotfish_evicted_keys_total                  -            keys removed: a tenant over its bound, or junk
    worker  pilotfish_routes_total                        outcome      session starts: kept, passed_on, stolen
    worker  pilotfish_predictions_total                   outcome      predicted cached tokens: equal, too_much ...
    worker  pilotfish_index_errors_total                  -            times the prefix index failed; jobs were kept
    worker  pilotfish_prefix_cache_queries_total          -            prefix tokens of the jobs
    worker  pilotfish_prefix_cache_hits_total             -            those that were not computed again
    worker  pilotfish_queue_seconds                       -            age of a job when its turn came, on Redis' clock
    worker  pilotfish_verify_seconds                      -            from a job's turn to its verdict
    edge    pilotfish_prompt_tokens_total                 -            tokens of prompts
    edge    pilotfish_generation_tokens_total             origin       committed tokens by who wrote them
    edge    pilotfish_spec_decode_num_draft_tokens_total  -            tokens sent as drafts
    edge    pilotfish_spec_decode_num_accepted_tokens_total -          those the target drew too
    edge    pilotfish_time_to_first_token_seconds         -            from a generation's start to its first token
    edge    pilotfish_request_time_per_output_token_seconds -          mean time between its tokens after that
    edge    pilotfish_e2e_request_latency_seconds         -            from its start to its end
    edge    pilotfish_broker_rtt_seconds                  -            to Redis and back, measured last
    edge    pilotfish_verdicts_total                      fate         verdicts: applied, stale, duplicate ...
    edge    pilotfish_resends_total                       -            rounds published again
    edge    pilotfish_generations_total                   outcome      finish reason, or the error's code
    edge    pilotfish_degraded_total                      -            generations that went on without the cloud
    edge    pilotfish_ceded_tokens_total                  -            tokens left to the cloud, drafting was slower
    edge    pilotfish_edge_cache_lookups_total            outcome      drafts that began without their KV: hit, miss
    edge    pilotfish_edge_cache_saved_tokens_total       -            tokens restored instead of computed
    edge    pilotfish_edge_cache_evictions_total          -            saved states dropped for room in memory
    edge    pilotfish_edge_cache_bytes                    -            memory of the saved states
    edge    pilotfish_audited_tokens_total                -            gated tokens that an audit labelled
    edge    pilotfish_audit_disagreements_total           -            those of them where the target drew another
    edge    pilotfish_gate_alarms_total                   -            gates shut because audits passed the budget

Where vLLM has a name for a thing, it is vLLM's, with our prefix. Counting is in process and free of I/O; who serves the
page is not known here (`http_operations.py` does).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from pilotfish.protocol.messages import Summary

REGISTRY: Final = CollectorRegistry()
_SECONDS: Final = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)

# both
RUNNING: Final = Gauge("pilotfish_num_requests_running", "Generations or jobs under way", registry=REGISTRY)
WAITING: Final = Gauge("pilotfish_num_requests_waiting", "Requests or jobs in line", registry=REGISTRY)
REQUESTS: Final = Counter("pilotfish_http_requests", "HTTP requests", ["route", "status"], registry=REGISTRY)

# worker
JOBS: Final = Counter("pilotfish_jobs", "Jobs answered", ["outcome"], registry=REGISTRY)
COMMITTED: Final = Counter("pilotfish_committed_tokens", "Draws asserted by verdicts", registry=REGISTRY)
ROWS: Final = Counter("pilotfish_engine_rows", "Positions the engine computed", registry=REGISTRY)
STEPS: Final = Counter("pilotfish_engine_steps", "Forward passes of the engine", registry=REGISTRY)
RESTARTS: Final = Counter("pilotfish_engine_restarts", "Engine processes started again", registry=REGISTRY)
SHED: Final = Counter("pilotfish_shed_jobs", "Jobs refused unread under overload", ["outcome"], registry=REGISTRY)
TRIMMED: Final = Counter("pilotfish_trimmed_jobs", "Jobs dropped unread, stream over its bound", registry=REGISTRY)
EVICTED: Final = Counter("pilotfish_evicted_keys", "Keys removed, tenant over its bound or junk", registry=REGISTRY)
ROUTES: Final = Counter("pilotfish_routes", "Session starts by where they went", ["outcome"], registry=REGISTRY)
PREDICTIONS: Final = Counter("pilotfish_predictions", "Predicted cached tokens", ["outcome"], registry=REGISTRY)
INDEX_ERRORS: Final = Counter("pilotfish_index_errors", "Failures of the prefix index", registry=REGISTRY)
CACHE_QUERIES: Final = Counter("pilotfish_prefix_cache_queries", "Prefix tokens of jobs", registry=REGISTRY)
CACHE_HITS: Final = Counter("pilotfish_prefix_cache_hits", "Prefix tokens not computed again", registry=REGISTRY)
QUEUE_SECONDS: Final = Histogram(
    "pilotfish_queue_seconds", "Age of a job when its turn came", buckets=_SECONDS, registry=REGISTRY
)
VERIFY_SECONDS: Final = Histogram(
    "pilotfish_verify_seconds", "From a job's turn to its verdict", buckets=_SECONDS, registry=REGISTRY
)

# edge
PROMPT_TOKENS: Final = Counter("pilotfish_prompt_tokens", "Tokens of prompts", registry=REGISTRY)
DRAFTED: Final = Counter("pilotfish_spec_decode_num_draft_tokens", "Tokens sent as drafts", registry=REGISTRY)
ACCEPTED: Final = Counter("pilotfish_spec_decode_num_accepted_tokens", "Drafts accepted", registry=REGISTRY)
FIRST_SECONDS: Final = Histogram(
    "pilotfish_time_to_first_token_seconds", "Time to the first token", buckets=_SECONDS, registry=REGISTRY
)
TOKEN_SECONDS: Final = Histogram(
    "pilotfish_request_time_per_output_token_seconds", "Mean time between tokens", buckets=_SECONDS, registry=REGISTRY
)
TOTAL_SECONDS: Final = Histogram(
    "pilotfish_e2e_request_latency_seconds", "From start to end", buckets=_SECONDS, registry=REGISTRY
)
RTT_SECONDS: Final = Gauge("pilotfish_broker_rtt_seconds", "To Redis and back", registry=REGISTRY)
TOKENS: Final = Counter("pilotfish_generation_tokens", "Committed tokens by origin", ["origin"], registry=REGISTRY)
VERDICTS: Final = Counter("pilotfish_verdicts", "Verdicts by what became of them", ["fate"], registry=REGISTRY)
RESENDS: Final = Counter("pilotfish_resends", "Rounds published again", registry=REGISTRY)
GENERATIONS: Final = Counter("pilotfish_generations", "Generations by outcome", ["outcome"], registry=REGISTRY)
DEGRADED: Final = Counter("pilotfish_degraded", "Generations that went on without the cloud", registry=REGISTRY)
CEDED: Final = Counter("pilotfish_ceded_tokens", "Tokens left to the cloud: drafting was slower", registry=REGISTRY)
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


def observe(summary: Summary) -> None:
    """One generation, at its end."""
    PROMPT_TOKENS.inc(summary.prompt_tokens)
    DRAFTED.inc(summary.drafted)
    ACCEPTED.inc(summary.accepted)
    TOTAL_SECONDS.observe(summary.total_ms / 1000)
    if summary.tokens:
        FIRST_SECONDS.observe(summary.first_token_ms / 1000)
    if summary.tokens > 1:
        TOKEN_SECONDS.observe((summary.total_ms - summary.first_token_ms) / (summary.tokens - 1) / 1000)


def told() -> dict[str, str]:
    """An agent's sums since its start, as its beat tells them: tokens by origin, drafts, audits, resends and more."""
    sums = {f"{name}_tokens": value for name, value in _values(TOKENS, "origin").items()}
    sums["drafted_tokens"] = sum(_values(DRAFTED).values())
    sums["generations"] = sum(_values(GENERATIONS, "outcome").values())
    sums["resends"] = sum(_values(RESENDS).values())
    sums["audited_tokens"], sums["audit_disagreements"] = (
        sum(_values(counter).values()) for counter in (AUDITED, AUDIT_DISAGREED)
    )
    return {name: f"{value:.0f}" for name, value in sums.items()}


def _values(counter: Counter, label: str = "") -> dict[str, float]:
    """A counter's value by its label, or by "" if it has none."""
    (family,) = counter.collect()
    return {s.labels.get(label, ""): s.value for s in family.samples if s.name.endswith("_total")}


def plain() -> dict[str, float]:
    """Every counter and gauge with one label at most, by its exposed name: "jobs_total{verdict}"."""
    families = [family for family in REGISTRY.collect() if family.type in ("counter", "gauge")]
    samples = [sample for family in families for sample in family.samples if not sample.name.endswith("_created")]
    return {_short(sample.name, sample.labels): sample.value for sample in samples if len(sample.labels) < 2}


def _short(name: str, labels: Mapping[str, str]) -> str:
    return name + "".join(f"{{{value}}}" for value in labels.values())
