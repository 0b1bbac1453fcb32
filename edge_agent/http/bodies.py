"""What a client may ask for, one page: the bodies of OpenAI's two text routes, and our own `pilotfish` block.

Every parameter is served, or refused by its name: none is dropped. One that OpenAI knows and nothing here can honour
may still be sent with the value that asks for nothing, as many clients do. Knows no agent and no HTTP.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeVar, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

from pilotfish.edge_agent.task import Task
from pilotfish.protocol.errors import Unsupported, UsageError
from pilotfish.protocol.messages import MAX_CONTEXT, MAX_TOKEN_ID, SEED_MAX, Prompt

MAX_CHOICES = 16
MAX_TEXT = 1_000_000

#: fields of a Prompt, or of a Task, that a request sets under `pilotfish`; a further one is a further word
WISHES = ("mode", "on_cloud_loss", "max_disagreement", "privacy", "draft_tokens", "deadline_ms")

Text = Annotated[str, Field(max_length=MAX_TEXT)]
Stop = Annotated[str, Field(min_length=1, max_length=256)]
Stops = Stop | Annotated[list[Stop], Field(max_length=4)]

# the value that asks for nothing, of a parameter that is not supported
Zero = Annotated[float, Field(ge=0, le=0)]
No = Literal[False]
NoMap = Annotated[dict[str, Any], Field(max_length=0)]
NoList = Annotated[list[Any], Field(max_length=0)]


class Body(BaseModel):
    """Base of everything a client sends: strict about names and types."""

    model_config = ConfigDict(extra="forbid", strict=True)


_hints = {**get_type_hints(Task, include_extras=True), **get_type_hints(Prompt, include_extras=True)}
_wishes: dict[str, Any] = {name: (_hints[name] | None, None) for name in WISHES if name in _hints}
Wishes: type[Body] = create_model("Wishes", __base__=Body, __doc__="How pilotfish should answer.", **_wishes)


class StreamOptions(Body):
    """With `include_usage` a last chunk without choices tells the usage."""

    include_usage: bool | None = None
    include_obfuscation: No | None = None


class _Asked(Body):
    """What both routes share. A value that is null or absent is the agent's own default."""

    model: Annotated[str, Field(max_length=256)]
    temperature: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, le=MAX_TOKEN_ID)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), le=SEED_MAX)] | None = None
    max_tokens: Annotated[int, Field(ge=1, le=MAX_CONTEXT)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    stop: Stops | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: Annotated[str, Field(max_length=256)] | None = None
    pilotfish: Wishes | None = None  # made above, from the fields of Prompt

    frequency_penalty: Zero | None = None
    presence_penalty: Zero | None = None
    logit_bias: NoMap | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def choices(self) -> int:
        """Answers wanted to each prompt."""
        return self.n or 1

    @property
    def wishes(self) -> dict[str, Any]:
        """What the `pilotfish` block sets."""
        block: Body | None = self.pilotfish
        return block.model_dump(exclude_none=True) if block else {}

    @property
    def tells_usage(self) -> bool:
        """Whether a stream ends with a chunk of usage."""
        return bool(self.stream_options and self.stream_options.include_usage)


# --- POST /v1/chat/completions -------------------------------------------------------------------------------


class TextPart(Body):
    """A part of a message; text is the only kind there is."""

    type: Literal["text"]
    text: Text


class Said(Body):
    """One message of the conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[TextPart], Field(min_length=1, max_length=64)]

    @property
    def turn(self) -> dict[str, str]:
        """As the chat template takes it; what OpenAI calls developer is everyone's system."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ChatBody(_Asked):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Said], Field(min_length=1, max_length=4096)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=MAX_CONTEXT)] | None = None
    logprobs: bool | None = None

    top_logprobs: Annotated[int, Field(ge=0, le=0)] | None = None
    tools: NoList | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    functions: NoList | None = None
    response_format: TextFormat | None = None
    modalities: Annotated[list[Literal["text"]], Field(max_length=1)] | None = None
    metadata: NoMap | None = None
    store: No | None = None
    service_tier: Literal["auto", "default"] | None = None

    @property
    def wants_logprobs(self) -> bool:
        """Whether each token comes with its log-probability."""
        return bool(self.logprobs)

    @property
    def most_tokens(self) -> int | None:
        """The longest answer, if the request says so; the newer name wins."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def prompts(self) -> list[str | list[dict[str, str]]]:
        """The one conversation."""
        return [[said.turn for said in self.messages]]


class TextFormat(Body):
    """Plain text is the only format."""

    type: Literal["text"]


# --- POST /v1/completions ------------------------------------------------------------------------------------


class CompletionBody(_Asked):
    """POST /v1/completions: raw text, without the chat template."""

    prompt: Text | Annotated[list[Text], Field(min_length=1, max_length=MAX_CHOICES)]
    logprobs: Annotated[int, Field(ge=0, le=0)] | None = None

    best_of: Annotated[int, Field(ge=1, le=1)] | None = None
    echo: No | None = None
    suffix: Annotated[str, Field(max_length=0)] | None = None

    @property
    def wants_logprobs(self) -> bool:
        """OpenAI's 0 here means: of the token itself, and no alternatives."""
        return self.logprobs is not None

    @property
    def most_tokens(self) -> int | None:
        """The longest answer, if the request says so."""
        return self.max_tokens

    @property
    def prompts(self) -> list[str | list[dict[str, str]]]:
        """One text or several."""
        return [self.prompt] if isinstance(self.prompt, str) else list(self.prompt)


Asked = ChatBody | CompletionBody
ChatBody.model_rebuild()
B = TypeVar("B", bound=BaseModel)

#: OpenAI's parameters that are taken only with the value that asks for nothing
NEUTRAL = frozenset(
    "frequency_penalty presence_penalty logit_bias top_logprobs tools tool_choice functions response_format modalities "
    "metadata store service_tier best_of echo suffix include_obfuscation".split()
)
_NAMES = frozenset(name for model in (ChatBody, CompletionBody, Said, TextPart, StreamOptions, TextFormat, Wishes)
                   for name in model.model_fields)  # fmt: skip


def read(kind: type[B], data: bytes) -> B:
    """A body from JSON. Raises Unsupported or UsageError with `param` and one sentence."""
    try:
        return kind.model_validate_json(data)
    except ValidationError as error:
        raise _refusal(error) from None


def _refusal(error: ValidationError) -> UsageError:
    """The first complaint; of several about one parameter, the one that looked deepest into it."""
    complaints = error.errors(include_url=False, include_context=False, include_input=False)
    first = next((one for one in complaints if one["type"] == "extra_forbidden"), complaints[0])
    loc = max((one["loc"] for one in complaints if one["loc"][:1] == first["loc"][:1]), key=len)
    first = next(one for one in complaints if one["loc"] == loc)
    extra = first["type"] == "extra_forbidden"
    param = _param(loc[:-1] if extra else loc) + (f".{str(loc[-1])[:64]}" if extra else "")
    param = param.removeprefix(".")
    if first["type"] == "json_invalid":
        return UsageError(f"the body is no JSON: {first['msg'].removeprefix('Invalid JSON: ')}")
    if extra:
        return Unsupported(f"{param} is not supported here: leave it out", param=param)
    if NEUTRAL & {str(part) for part in loc}:
        return Unsupported(f"{param} is not supported here, but for the value that asks for nothing", param=param)
    if not param:
        return UsageError(f"the body is not a JSON object: {first['msg']}")
    return UsageError(f"{param}: {first['msg']}", param=param)


def _param(loc: Sequence[int | str]) -> str:
    """Where in the body, as in .messages[0].content: without pydantic's names for the types it tried."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc if _is_place(part))


def _is_place(part: int | str) -> bool:
    return isinstance(part, int) or part in _NAMES
