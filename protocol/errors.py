"""Every error pilotfish raises, one page. A sentence says what failed and what to do.

    PilotfishError                 anything of ours; `code` travels on the wire, `exit_code` leaves the CLI
    ├── UsageError                 the caller asked for something that cannot be (exit 2)
    │   ├── SettingsError          a flag, variable or file that names or holds something wrong
    │   ├── PromptTooLong          the prompt and the room for an answer exceed the context
    │   ├── EmptyPrompt            nothing to continue
    │   ├── Unsupported            a parameter of a request that nothing here can honour
    │   └── UnknownModel           a request for a model that is not served
    ├── Overloaded                 too many requests at a time: try again (exit 3)
    ├── Draining                   this process is ending and takes nothing new: go to another (exit 3)
    ├── InvalidMessage             bytes from the wire that are not a message of ours
    ├── ModelError                 a model file that cannot be loaded (exit 2)
    │   ├── HubError               a model hub has not, or does not give, what was named
    │   │   └── HubUnreachable     nothing answers at the hub, or it is in trouble (exit 3)
    │   └── PairMismatch           draft and target disagree about the vocabulary
    ├── StateError                 a saved KV state is damaged
    │   └── BuildMismatch          another build of model or program saved it (exit 2)
    ├── BrokerError                Redis cannot be used (exit 3)
    │   ├── BrokerUnreachable      nothing answers at the URL
    │   ├── BrokerRefused          Redis answers and says no (password, ACL)
    │   └── WrongType              a key is not of the kind that `keys.py` says
    ├── CloudError                 the cloud did not answer, or refused (exit 3)
    │   ├── NoWorker               no live worker serves the target
    │   ├── NoAgent                no live agent takes submitted prompts
    │   ├── AnswerLost             the answer to a submitted prompt can no longer be read to its end
    │   ├── JobRefused             a worker answered a job with an error code
    │   └── DeadlineExceeded       time ran out while waiting for a verdict
    ├── StoreError                 what was learnt about a pair cannot be read or saved
    ├── EngineError                an inference engine failed
    │   └── RequestRefused         the engine will not take this one request; others are unaffected
    └── Cancelled                  the user stopped the request (exit 130)

A command that fails with one of them exits with 1 where the tree names no other code.
"""

from __future__ import annotations


class PilotfishError(Exception):
    """Base of the tree. `str(error)` is the sentence shown to a person."""

    code = "internal"
    exit_code = 1


class UsageError(PilotfishError):
    """The caller asked for something that cannot be; `param` names what, where a request has parameters."""

    code = "bad_request"
    exit_code = 2

    def __init__(self, sentence: str, *, param: str | None = None) -> None:
        super().__init__(sentence)
        self.param = param


class SettingsError(UsageError):
    """A setting has an unknown name or an impossible value."""

    code = "bad_setting"


class PromptTooLong(UsageError):
    """The prompt and the room for an answer exceed the context."""

    code = "too_long"


class EmptyPrompt(UsageError):
    """There is nothing to continue."""

    code = "empty_prompt"


class Unsupported(UsageError):
    """A parameter of a request that nothing here can honour; it is named, never dropped."""

    code = "unsupported_parameter"


class UnknownModel(UsageError):
    """A request for a model that is not served."""

    code = "model_not_found"


class Overloaded(PilotfishError):
    """Too many requests at a time: try again in `retry_after_s` seconds."""

    code = "overloaded"
    exit_code = 3

    def __init__(self, sentence: str, *, retry_after_s: int = 1) -> None:
        super().__init__(sentence)
        self.retry_after_s = retry_after_s


class Draining(PilotfishError):
    """This process is ending and takes nothing new: go to another."""

    code = "draining"
    exit_code = 3


class InvalidMessage(PilotfishError):
    """Bytes from the wire that are not a message of ours; `decode` raises this and nothing else."""

    code = "invalid_message"


class ModelError(PilotfishError):
    """A model file cannot be loaded."""

    code = "bad_model"
    exit_code = 2


class HubError(ModelError):
    """A model hub has not, or does not give, what was named."""

    code = "hub_refused"


class HubUnreachable(HubError):
    """Nothing answers at the hub, or it is in trouble; what came is kept, and the next try goes on from there."""

    code = "hub_unreachable"
    exit_code = 3


class PairMismatch(ModelError):
    """Draft and target disagree about the vocabulary; names the first differing token."""

    code = "pair_mismatch"


class StateError(PilotfishError):
    """A saved KV state is damaged."""

    code = "bad_state"


class BuildMismatch(StateError):
    """A saved KV state belongs to another build of the model, or of pilotfish; names the first differing field."""

    code = "build_mismatch"
    exit_code = 2


class BrokerError(PilotfishError):
    """Redis cannot be used."""

    code = "broker"
    exit_code = 3


class BrokerUnreachable(BrokerError):
    """Nothing answers at the Redis URL."""

    code = "broker_unreachable"


class BrokerRefused(BrokerError):
    """Redis answers and says no: password, ACL, memory."""

    code = "broker_refused"


class WrongType(BrokerError):
    """A key is not of the kind that `keys.py` says: someone else wrote it."""

    code = "wrong_type"


class CloudError(PilotfishError):
    """The cloud did not answer, or refused."""

    code = "cloud"
    exit_code = 3


class NoWorker(CloudError):
    """No live worker serves the target."""

    code = "no_worker"


class NoAgent(CloudError):
    """No live agent takes submitted prompts."""

    code = "no_agent"


class AnswerLost(CloudError):
    """Redis lost a submitted prompt or a part of its answer, or two agents answered it differently."""

    code = "answer_lost"


class JobRefused(CloudError):
    """A worker answered a job with an error code (kept in `wire_code`)."""

    code = "job_refused"

    def __init__(self, wire_code: str, sentence: str) -> None:
        super().__init__(sentence)
        self.wire_code = wire_code


class DeadlineExceeded(CloudError):
    """Time ran out while waiting for a verdict."""

    code = "deadline"


class StoreError(PilotfishError):
    """What was learnt about a pair cannot be read or saved; generations go on without."""

    code = "store"


class EngineError(PilotfishError):
    """An inference engine failed; jobs it held get an error reply."""

    code = "engine_failed"


class RequestRefused(EngineError):
    """The engine will not take this one request; the others are unaffected."""

    code = "refused"


class Cancelled(PilotfishError):
    """The user stopped the request."""

    code = "cancelled"
    exit_code = 130
