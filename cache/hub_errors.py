"""What the hub, the network and the disk say during a download, as sentences of ours."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from pilotfish.cache.hub_name import HubName
from pilotfish.protocol.errors import HubError, HubUnreachable, ModelError

KEPT = "try again; what came is kept"


@contextmanager
def told(name: HubName, endpoint: str) -> Iterator[None]:
    """Raise HubError, HubUnreachable or ModelError for what libraries raise in the block."""
    import httpx2  # what huggingface_hub speaks HTTP with
    from huggingface_hub import errors

    token = "set HF_TOKEN (or `hf auth login`)"
    try:
        yield
    except errors.GatedRepoError:
        raise HubError(f"{name.id} is gated: accept its terms on its page with your account, then {token}") from None
    except errors.RepositoryNotFoundError:
        raise HubError(f"the hub has no model {name.id}, or it is private: check the name, or {token}") from None
    except errors.RevisionNotFoundError:
        raise HubError(f"{name.id} has no revision {name.revision}: see its branches, or leave @… out") from None
    except errors.HFValidationError as error:
        raise HubError(f"the hub takes no such name as {name.id}: {error}") from None
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        raise HubUnreachable(f"the hub {endpoint} answered {status} for {name}: {KEPT}") from None
    except (httpx2.HTTPError, errors.OfflineModeIsEnabled) as error:
        sentence = f"the hub {endpoint} cannot be reached for {name} ({error}): check the network and {KEPT}"
        raise HubUnreachable(sentence) from None
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ModelError(f"the disk is full while fetching {name}: make room and {KEPT}") from None
        raise ModelError(f"fetching {name} failed: {error}; {KEPT}") from None
