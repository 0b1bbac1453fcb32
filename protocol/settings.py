"""Every setting, one page: name, default, bounds, use. Then how a value is found.

A value comes from the command line, else the environment (PILOTFISH_<NAME>, and REDIS_URL), else the file, else the
default. The file is `--config` or PILOTFISH_CONFIG, else ./pilotfish.toml, else <XDG config>/pilotfish/config.toml: one
`name = value` per line. A name nobody knows is refused with the nearest one. This module knows no Redis and no model.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Final, Literal
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    SecretStr,
    ValidationError,
)
from pydantic_core import PydanticCustomError

from pilotfish.protocol.errors import SettingsError
from pilotfish.protocol.home import expand_user
from pilotfish.protocol.messages import (
    MAX_CONTEXT,
    MAX_DRAFT,
    MAX_TOKEN_ID,
    SEED_MAX,
    Drafting,
    Mode,
    Name,
    OnCloudLoss,
    Privacy,
)

ENV_PREFIX = "PILOTFISH_"
ENV_CONFIG = "PILOTFISH_CONFIG"
ENV_ALIASES = {"REDIS_URL": "redis_url", "HF_HUB_OFFLINE": "offline"}  # a PILOTFISH_ variable of the same setting wins


def _redis_url(url: str) -> str:
    if urlsplit(url).scheme not in ("redis", "rediss", "unix"):
        raise ValueError("it starts with redis://, rediss:// or unix://")
    return url


def _expanded(value: object) -> object:
    try:
        return expand_user(value) if isinstance(value, str | os.PathLike) else value
    except SettingsError as error:
        raise PydanticCustomError(_NO_HOME, "{why}", {"why": str(error)}) from None


_NO_HOME: Final = "no_home"  # pydantic's error of this type is a whole sentence
RedisUrl = Annotated[str, AfterValidator(_redis_url)]
UserPath = Annotated[Path, BeforeValidator(_expanded)]
ModelName = Annotated[str, BeforeValidator(_expanded)]  # a path, or hf://…
Preset = Literal["qwen2.5-7b", "qwen3-8b", "llama3.1-8b"]  # what they are stands in cache/presets.py


class Settings(BaseModel):
    """What can be set. `None` means: chosen when it is needed, as the description says."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    _origins: dict[str, str] = PrivateAttr(default_factory=dict)

    # broker
    redis_url: RedisUrl | None = Field(None, description="Redis of the jobs; unset: the private one that runs here")
    tls_ca: UserPath | None = Field(None, description="CA certificate of rediss:// (PEM); unset: the system's")
    allow_plaintext: bool = Field(False, description="speak to a Redis on another machine without TLS")
    tenant: Name = Field("default", description="whose jobs these are; a tenant is a Redis ACL user")
    agent: Name | None = Field(None, description="name of this device; unset: made from the host name")
    target: Name | None = Field(None, description="name of the target to ask; unset: the only one there is")

    # one generation
    mode: Mode = Field("exact", description="who commits: exact (the cloud verifies all), gated, cloud_only, edge_only")
    max_disagreement: float = Field(
        0.02, ge=0, le=1, allow_inf_nan=False, description="gated: share of tokens that may differ from the target's"
    )
    privacy: Privacy = Field("shared", description="local_only: nothing of a request leaves this device")
    on_cloud_loss: OnCloudLoss | None = Field(None, description="wait or go on locally; unset: the mode decides")
    max_tokens: int = Field(256, ge=1, le=MAX_CONTEXT, description="longest answer, in tokens")
    temperature: float = Field(0.0, ge=0, le=100, allow_inf_nan=False, description="0 takes the likeliest token")
    top_k: int = Field(0, ge=0, le=MAX_TOKEN_ID, description="keep the k likeliest tokens; 0 keeps all")
    top_p: float = Field(1.0, gt=0, le=1, description="keep the likeliest tokens up to this probability")
    min_p: float = Field(0.0, ge=0, le=1, description="drop tokens below this share of the likeliest one")
    seed: int | None = Field(None, ge=0, le=SEED_MAX, description="seed of the draws; unset: random, and told")
    deadline_ms: int = Field(120_000, ge=1, le=86_400_000, description="a request gives up after this many ms")

    # the conversation with the cloud
    drafting: Drafting = Field("auto", description="auto: as far as it pays; always; fixed: draft_tokens each round")
    draft_tokens: int | None = Field(None, ge=0, le=MAX_DRAFT, description="most tokens drafted for one round")
    window: int = Field(8, ge=1, le=16, description="most rounds under way; 1: no drafting while a verdict is away")
    round_timeout_ms: int = Field(5_000, ge=10, le=3_600_000, description="a round is sent again after this many ms")
    resends: int = Field(2, ge=0, le=10, description="how often a round is sent again before the cloud counts as lost")
    pad_messages: bool = Field(False, description="pad jobs and verdicts to fixed sizes, which then tell nothing")

    # the device
    draft_model: ModelName | None = Field(None, description="GGUF file of the draft, or hf://…; unset: the demo draft")
    draft_threads: int | None = Field(None, ge=1, le=1024, description="CPU threads of the draft; unset: by cores")
    strategy: Name = Field("margin", description="how the draft's confidence is read; ensemble: all together")
    strategies_off: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.,-]*$")] = Field(
        "", description="strategies that are not used, as in entropy,margin"
    )
    audit_share: float = Field(
        0.05, ge=0, le=1, allow_inf_nan=False, description="gated: share of requests the target scores afterwards"
    )
    edge_cache_mb: float = Field(
        512.0,
        ge=0,
        le=10_000_000,
        allow_inf_nan=False,
        description="memory of the draft's saved KV states; 0: keep none",
    )
    edge_cache_disk_mb: float = Field(
        0.0, ge=0, le=10_000_000, allow_inf_nan=False, description="disk for them, kept across restarts; 0: none"
    )

    # HTTP: the API of an agent, metrics and health of both sides
    serve_host: str = Field("127.0.0.1", description="address to serve HTTP on; any but this machine's own wants a key")
    serve_port: int = Field(8787, ge=0, le=65535, description="port of the API; 0 takes a free one")
    api_key: SecretStr | None = Field(None, description="key that every request must bring; unset: none")
    keys_file: UserPath | None = Field(None, description="keys of others and their profiles (TOML); unset: none")
    metrics_key: SecretStr | None = Field(None, description="key of /metrics alone; unset: the API's")
    allowed_hosts: str | None = Field(None, description="host names served besides localhost, as in box,box.lan")
    serve_requests: int = Field(4, ge=1, le=1024, description="generations the API runs at a time")
    serve_waiting: int = Field(64, ge=0, le=100_000, description="requests that may wait; more are told to come back")
    metrics_port: int | None = Field(None, ge=0, le=65535, description="port of metrics and health alone; unset: none")

    # the cloud worker
    engine: Name = Field("auto", description="auto: vLLM if installed, else llamacpp; fake, or one of your own")
    target_model: ModelName | None = Field(
        None, description="folder or GGUF file of the target, or hf://…; unset: the demo target"
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="numbers the target computes in")
    draft_max: int = Field(16, ge=1, le=MAX_DRAFT, description="longest draft a worker takes in one round")
    max_sessions: int = Field(64, ge=1, le=100_000, description="sessions a worker serves at a time")
    kv_cache_gb: float = Field(1.0, gt=0, le=10_000, allow_inf_nan=False, description="memory of the target's KV cache")
    compiled: bool = Field(
        False, description="compile the target (vLLM): faster rounds, the first start takes a minute"
    )
    engine_threads: int | None = Field(None, ge=1, le=1024, description="CPU threads of the target; unset: by cores")
    engine_args: str | None = Field(None, description="more of vLLM's EngineArgs, as a JSON object; see docs/fleet.md")
    tenant_mb: int = Field(256, ge=1, le=1_000_000, description="MB of Redis that one tenant may fill; more is removed")

    routing: Literal["prefix", "load", "off"] = Field(
        "prefix", description="a new session goes where its prefix is cached, to the shortest queue, or stays"
    )
    cache_key: SecretStr | None = Field(None, description="keeps tenants' caches apart; unset: one that workers share")

    # both sides
    preset: Preset | None = Field(None, description="a known pair of models from a hub, as in docs/models.md")
    offline: bool = Field(False, description="fetch no models; use what is here")
    kv_reuse: bool = Field(True, description="use KV again, on both sides; off: every round and turn is computed anew")
    context: int = Field(4096, ge=16, le=MAX_CONTEXT, description="longest prompt and answer together, in tokens")
    cores: Annotated[str, Field(pattern=r"^\d+(,\d+)*$")] | None = Field(
        None, description="CPU cores of this process's engine, as in 0,1; unset: all"
    )
    cache_dir: UserPath | None = Field(None, description="converted models and such; unset: <XDG cache>/pilotfish")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="what is logged")
    log_format: Literal["text", "json"] = Field("text", description="how: lines for people, or one JSON object each")
    otlp_endpoint: str | None = Field(None, description="OpenTelemetry collector (OTLP over HTTP); unset: no traces")

    def origins(self) -> dict[str, str]:
        """Setting -> "cli", "env VARIABLE", "file PATH" or "default"."""
        return {name: self._origins.get(name, "default") for name in type(self).model_fields}

    def suggest(self, **values: Any) -> Settings:
        """A copy with these values where nobody chose others; they count as given on the command line."""
        free = {name: value for name, value in values.items() if self.origins()[name] == "default"}
        copy = self.model_copy(update=free)
        copy._origins = {**self._origins, **dict.fromkeys(free, "cli")}
        return copy

    def shown(self) -> dict[str, str]:
        """Setting -> its value as a person may see it: no password, "unset" for None."""
        return {name: _shown(name, getattr(self, name)) for name in type(self).model_fields}


# --- finding a value -----------------------------------------------------------------------------------------


def load(
    cli: Mapping[str, Any] | None = None,
    config: str | Path | None = None,
    environ: Mapping[str, str] | None = None,
) -> Settings:
    """All settings. `cli` holds what was given on the command line (None = not given), `config` its `--config`.

    Raises SettingsError for an unknown name (tells the nearest), an impossible value (tells what is allowed) and a file
    that cannot be read.
    """
    environ = os.environ if environ is None else environ
    path = config_file(config, environ)
    layers = [_from_file(path) if path else {}, _from_environ(environ), _from_cli(cli or {})]
    found = {name: entry for layer in layers for name, entry in layer.items()}
    origins = {name: origin for name, (_, origin) in found.items()}
    try:
        settings = Settings.model_validate({name: value for name, (value, _) in found.items()})
    except ValidationError as error:
        raise _refused(error, origins) from None
    settings._origins.update(origins)
    return settings


def config_file(config: str | Path | None, environ: Mapping[str, str]) -> Path | None:
    """The file settings come from: the one named (which must exist), else the first found of the usual two."""
    if named := config or environ.get(ENV_CONFIG):
        path = Path(expand_user(named))
        if not path.is_file():
            raise SettingsError(f"there is no settings file {path}: create it, or drop --config and {ENV_CONFIG}")
        return path
    chosen = environ.get("XDG_CONFIG_HOME")
    home = expand_user(chosen) if chosen else os.path.expanduser("~/.config")  # a user without a home has no file there
    usual = (Path("pilotfish.toml"), Path(home, "pilotfish", "config.toml"))
    return next((path for path in usual if path.is_file()), None)


Layer = dict[str, tuple[Any, str]]  # setting -> (value, origin)


def _from_cli(cli: Mapping[str, Any]) -> Layer:
    return {_known(name, "the command line"): (value, "cli") for name, value in cli.items() if value is not None}


def _from_environ(environ: Mapping[str, str]) -> Layer:
    """Variables of ours; an empty one counts as unset, as in compose files."""
    aliases = {key: environ[key] for key in ENV_ALIASES if environ.get(key)}
    layer: Layer = {ENV_ALIASES[key]: (value, f"env {key}") for key, value in aliases.items()}
    for key, value in environ.items():
        if key.startswith(ENV_PREFIX) and key != ENV_CONFIG:
            name = _known(key.removeprefix(ENV_PREFIX).lower(), f"the environment ({key})")
            layer |= {name: (value, f"env {key}")} if value else {}
    return layer


def _from_file(path: Path) -> Layer:
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise SettingsError(f"the settings file {path} cannot be read: {error}") from None
    return {_known(name, str(path)): (value, f"file {path}") for name, value in content.items()}


def _known(name: str, where: str) -> str:
    if name in Settings.model_fields:
        return name
    near = get_close_matches(name.replace("-", "_").lower(), Settings.model_fields, n=1, cutoff=0.0)[0]
    raise SettingsError(f"{where} names an unknown setting, {name[:80]!r}: did you mean {near!r}?")


def _refused(error: ValidationError, origins: Mapping[str, str]) -> SettingsError:
    first = error.errors(include_url=False, include_context=False)[0]
    name = str(first["loc"][0])
    value, origin = _shown(name, first["input"]), origins.get(name, "default")
    why = first["msg"] if first["type"] == _NO_HOME else f"it takes {allowed(name)}"
    return SettingsError(f"{name} = {value!r} (from {origin}) is not possible: {why}")


# --- for people ----------------------------------------------------------------------------------------------


def allowed(name: str) -> str:
    """What a setting takes, in words: "an integer from 0 to 256", "exact, cloud_only or edge_only"."""
    schema = Settings.model_json_schema()["properties"][name]
    kinds = [part for part in schema.get("anyOf", [schema]) if part.get("type") != "null"]
    return " or ".join(_in_words(name, kind) for kind in kinds)


def _in_words(name: str, kind: Mapping[str, Any]) -> str:
    if "enum" in kind:
        *others, last = kind["enum"]
        return f"{', '.join(others)} or {last}"
    if name == "redis_url":
        return "a URL that starts with redis://, rediss:// or unix://"
    if kind.get("format") == "path":
        return "a path"
    words = {"integer": "an integer", "number": "a number", "string": "a text", "boolean": "true or false"}[
        kind["type"]
    ]
    low = f" from {kind['minimum']}" if "minimum" in kind else ""
    low = f" above {kind['exclusiveMinimum']}" if "exclusiveMinimum" in kind else low
    pattern = f" that matches {kind['pattern']}" if "pattern" in kind else ""
    return words + low + (f" to {kind['maximum']}" if "maximum" in kind else "") + pattern


def redacted(url: str) -> str:
    """A URL as it may be printed: without its password. Takes what is no URL as well, an error has to name it."""
    head, at, tail = url.rpartition("@")
    scheme, _, credentials = head.rpartition("//")
    return f"{scheme}//{credentials.partition(':')[0]}:***@{tail}" if at else url


def _shown(name: str, value: Any) -> str:
    if value is None:
        return "unset"
    return redacted(str(value)) if name == "redis_url" else str(value)
