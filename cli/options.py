"""Every option that sets a setting, in one place; `takes` gives a command the ones it needs.

The words are those of `protocol/settings.py` (a test compares them): repeated here, because reading that page loads
pydantic, and `--help` must not wait for it. Knows names and words; what is possible is decided there.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Annotated, Any, get_type_hints

import typer

#: setting -> (type, what it is for[, the words it takes])
OPTIONS: dict[str, tuple[Any, ...]] = {
    "redis_url": (str, "Redis of the jobs; unset: the private one that runs here"),
    "tls_ca": (str, "CA certificate of rediss:// (PEM); unset: the system's"),
    "allow_plaintext": (bool, "speak to a Redis on another machine without TLS"),
    "tenant": (str, "whose jobs these are; a tenant is a Redis ACL user"),
    "agent": (str, "name of this device; unset: made from the host name"),
    "target": (str, "name of the target to ask; unset: the only one there is"),
    "mode": (
        str,
        "who commits: exact (the cloud verifies all), gated, cloud_only, edge_only",
        "exact|gated|cloud_only|edge_only",
    ),
    "max_disagreement": (float, "gated: share of tokens that may differ from the target's"),
    "privacy": (str, "local_only: nothing of a request leaves this device", "shared|local_only"),
    "on_cloud_loss": (str, "wait or go on locally; unset: the mode decides", "wait|local"),
    "max_tokens": (int, "longest answer, in tokens"),
    "temperature": (float, "0 takes the likeliest token"),
    "top_k": (int, "keep the k likeliest tokens; 0 keeps all"),
    "top_p": (float, "keep the likeliest tokens up to this probability"),
    "min_p": (float, "drop tokens below this share of the likeliest one"),
    "seed": (int, "seed of the draws; unset: random, and told"),
    "deadline_ms": (int, "a request gives up after this many ms"),
    "drafting": (str, "auto: as far as it pays; always; fixed: draft_tokens each round", "auto|always|fixed"),
    "draft_tokens": (int, "most tokens drafted for one round"),
    "window": (int, "most rounds under way; 1: no drafting while a verdict is away"),
    "round_timeout_ms": (int, "a round is sent again after this many ms"),
    "resends": (int, "how often a round is sent again before the cloud counts as lost"),
    "pad_messages": (bool, "pad jobs and verdicts to fixed sizes, which then tell nothing"),
    "draft_model": (str, "GGUF file of the draft, or hf://…; unset: the demo draft"),
    "draft_threads": (int, "CPU threads of the draft; unset: by cores"),
    "edge_cache_mb": (float, "memory of the draft's saved KV states; 0: keep none"),
    "edge_cache_disk_mb": (float, "disk for them, kept across restarts; 0: none"),
    "strategy": (str, "how the draft's confidence is read; ensemble: all together"),
    "strategies_off": (str, "strategies that are not used, as in entropy,margin"),
    "audit_share": (float, "gated: share of requests the target scores afterwards"),
    "serve_host": (str, "address to serve HTTP on; any but this machine's own wants a key"),
    "serve_port": (int, "port of the API; 0 takes a free one"),
    "api_key": (str, "key that every request must bring; unset: none"),
    "keys_file": (str, "keys of others and their profiles (TOML); unset: none"),
    "metrics_key": (str, "key of /metrics alone; unset: the API's"),
    "allowed_hosts": (str, "host names served besides localhost, as in box,box.lan"),
    "serve_requests": (int, "generations the API runs at a time"),
    "serve_waiting": (int, "requests that may wait; more are told to come back"),
    "metrics_port": (int, "port of metrics and health alone; unset: none"),
    "engine": (str, "auto: vLLM if installed, else llamacpp; fake, or one of your own"),
    "target_model": (str, "folder or GGUF file of the target, or hf://…; unset: the demo target"),
    "dtype": (str, "numbers the target computes in", "float32|bfloat16|float16"),
    "draft_max": (int, "longest draft a worker takes in one round"),
    "max_sessions": (int, "sessions a worker serves at a time"),
    "kv_cache_gb": (float, "memory of the target's KV cache"),
    "compiled": (bool, "compile the target (vLLM): faster rounds, the first start takes a minute"),
    "engine_threads": (int, "CPU threads of the target; unset: by cores"),
    "engine_args": (str, "more of vLLM's EngineArgs, as a JSON object; see docs/fleet.md"),
    "tenant_mb": (int, "MB of Redis that one tenant may fill; more is removed"),
    "routing": (
        str,
        "a new session goes where its prefix is cached, to the shortest queue, or stays",
        "prefix|load|off",
    ),
    "cache_key": (str, "keeps tenants' caches apart; unset: one that workers share"),
    "preset": (str, "a known pair of models from a hub, as in docs/models.md", "qwen2.5-7b|qwen3-8b|llama3.1-8b"),
    "offline": (bool, "fetch no models; use what is here"),
    "kv_reuse": (bool, "use KV again, on both sides; off: every round and turn is computed anew"),
    "context": (int, "longest prompt and answer together, in tokens"),
    "cores": (str, "CPU cores of this process's engine, as in 0,1; unset: all"),
    "cache_dir": (str, "converted models and such; unset: <XDG cache>/pilotfish"),
    "log_level": (str, "what is logged", "debug|info|warning|error"),
    "log_format": (str, "how: lines for people, or one JSON object each", "text|json"),
    "otlp_endpoint": (str, "OpenTelemetry collector (OTLP over HTTP); unset: no traces"),
}

BROKER = ("redis_url", "tls_ca", "allow_plaintext", "tenant")
REQUEST = (
    "mode", "max_disagreement", "privacy", "on_cloud_loss", "max_tokens",
    "temperature", "top_k", "top_p", "min_p", "seed", "deadline_ms",
)  # fmt: skip
EDGE_CACHE = ("edge_cache_mb", "edge_cache_disk_mb")
DRAFT = (
    "drafting", "draft_tokens", "window", "round_timeout_ms", "resends", "pad_messages",
    "draft_model", "draft_threads", "strategy", "strategies_off", "audit_share", *EDGE_CACHE,
)  # fmt: skip
TARGET = (
    "engine", "target_model", "dtype", "draft_max", "max_sessions", "kv_cache_gb", "compiled", "engine_threads",
    "engine_args", "routing", "cache_key",
)  # fmt: skip
TENANTS = ("tenant_mb",)
MODELS = ("preset", "offline", "cache_dir")
MACHINE = ("kv_reuse", "context", "cores", *MODELS)
ACCESS = ("serve_host", "api_key", "metrics_key", "allowed_hosts", "metrics_port")
SERVE = (*ACCESS, "keys_file", "serve_port", "serve_requests", "serve_waiting")
TRACE = ("log_format", "otlp_endpoint")

#: a command's own flag for data in JSON
AsJson = Annotated[bool, typer.Option("--json", help="Print data as JSON.")]
Trace = Annotated[bool, typer.Option("--trace", help="Colour each token by who wrote it.")]


def _show_help(context: typer.Context, wanted: bool) -> None:
    if wanted and not context.resilient_parsing:
        print(context.get_help())
        raise typer.Exit


#: a group's own --help: typer's built-in one makes every command below it load pydantic before it can show its help
Help = Annotated[
    bool, typer.Option("-h", "--help", help="Show this message and exit.", is_eager=True, callback=_show_help)
]

Command = Callable[..., None]


def takes(*names: str) -> Callable[[Command], Command]:
    """Give a command these options, --config and --log-level.

    It gets what they and all other sources say as `settings`, its first argument.
    """
    wanted = (*names, "log_level")

    def decorate(command: Command) -> Command:
        @functools.wraps(command)
        def run(**given: Any) -> None:
            chosen = {name: given.pop(name) for name in wanted}
            command(_load(chosen, given.pop("config")), **given)

        own = _own_parameters(command)
        more = [*map(_parameter, wanted), _config()]
        run.__signature__ = inspect.Signature([*own, *more])  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in [*own, *more]}
        return run

    return decorate


def _own_parameters(command: Command) -> list[inspect.Parameter]:
    """A command's parameters after `settings`, by keyword, their annotations evaluated."""
    hints = get_type_hints(command, localns={"Settings": object}, include_extras=True)
    _, *own = inspect.signature(command).parameters.values()
    return [one.replace(annotation=hints[one.name], kind=inspect.Parameter.KEYWORD_ONLY) for one in own]


def _parameter(name: str) -> inspect.Parameter:
    kind, words, *choices = OPTIONS[name]
    switch = f"{flag(name)}/{flag(f'no_{name}')}" if kind is bool else flag(name)
    option = typer.Option(switch, help=f"{words[0].upper()}{words[1:]}.", metavar=choices[0] if choices else None)
    return _keyword(name, Annotated[kind | None, option])


def _config() -> inspect.Parameter:
    return _keyword("config", Annotated[str | None, typer.Option("--config", help="Settings file to read.")])


def _keyword(name: str, annotation: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def flag(name: str) -> str:
    """A setting as it is written on the command line."""
    return "--" + name.replace("_", "-")


def written(name: str, value: object) -> list[str]:
    """A setting and its value as words of a command line."""
    if isinstance(value, bool):
        return [flag(name) if value else flag(f"no_{name}")]
    return [flag(name), str(value)]


def _load(chosen: dict[str, Any], config: str | None) -> Any:
    import logging

    from pilotfish.protocol.settings import load

    settings = load(chosen, config)
    if settings.log_format == "json":
        from pilotfish.protocol.logs import use_json

        use_json()
    logger = logging.getLogger("pilotfish")
    if not logger.isEnabledFor(logging.DEBUG):  # `pilotfish --debug` came first
        logger.setLevel(settings.log_level.upper())
    return settings
