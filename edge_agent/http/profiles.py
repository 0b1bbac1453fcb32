"""What an HTTP key of this device may have: a profile with a mode, a budget of disagreement and a rate, from a file.

    [profiles.kitchen]
    mode = "gated"               # what its requests run in; asking for another is refused
    max_disagreement = 0.05      # most that a request may ask for, and what it gets
    requests_per_minute = 30     # of each of its keys; more are told when to come back
    keys = ["sha256:9f86d0..."]  # or the key itself, in a file that only its owner may read

A key's bucket holds a minute's worth of requests. Every key of the file is compared, in constant time, whichever fits.
Knows keys and numbers; nothing of HTTP.
"""

from __future__ import annotations

import hashlib
import hmac
import math
import re
import time
import tomllib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Final

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pilotfish.protocol.errors import Overloaded, SettingsError
from pilotfish.protocol.messages import Mode, Name, Share

HASHED: Final = re.compile(r"sha256:([0-9a-f]{64})")
KEY_MIN: Final = 16  # characters of a key that stands in the file itself
RETRY_MAX_SECONDS: Final = 60


class Profile(BaseModel):
    """One table of the file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    mode: Mode | None = None
    max_disagreement: Share | None = None
    requests_per_minute: Annotated[float, Field(gt=0, le=1_000_000, allow_inf_nan=False)] | None = None
    keys: Annotated[tuple[str, ...], Field(min_length=1)]


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid")

    profiles: dict[Name, Profile]


class Bearer:
    """Who brings one key: its profile, and how many requests it has left."""

    def __init__(self, name: str, profile: Profile, clock: Callable[[], float] = time.monotonic) -> None:
        self.name, self.profile = name, profile
        self._clock = clock
        self._left, self._since = profile.requests_per_minute or 0.0, clock()

    def take(self) -> None:
        """One request. Raises Overloaded over the key's rate."""
        rate = self.profile.requests_per_minute
        if rate is None:
            return
        most, now = max(1.0, rate), self._clock()
        self._left = min(most, self._left + (now - self._since) * rate / 60)
        self._since = now
        if self._left < 1:
            wait = min(RETRY_MAX_SECONDS, math.ceil((1 - self._left) * 60 / rate))
            raise Overloaded(
                f"this key's profile {self.name} allows {rate:g} requests a minute: try again in {wait} s",
                retry_after_s=wait,
            )
        self._left -= 1


class Keyring:
    """Every key of a file."""

    def __init__(self, profiles: Mapping[str, Profile], clock: Callable[[], float] = time.monotonic) -> None:
        self._bearers = [
            (_digest(key), Bearer(name, profile, clock)) for name, profile in profiles.items() for key in profile.keys
        ]

    def bearer(self, given: Sequence[str]) -> Bearer | None:
        """Who brings one of these keys."""
        found = None
        for digest in (hashlib.sha256(key.encode()).digest() for key in given):
            for known, bearer in self._bearers:
                found = bearer if hmac.compare_digest(digest, known) else found
        return found


def _digest(key: str) -> bytes:
    if hashed := HASHED.fullmatch(key):
        return bytes.fromhex(hashed[1])
    return hashlib.sha256(key.encode()).digest()


def read(path: Path) -> Keyring:
    """A file's keys. Raises SettingsError for one that cannot be read, says what nobody knows, or shows its keys."""
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
        profiles = _File.model_validate(content).profiles
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise SettingsError(
            f"the keys file {path} cannot be read ({error}): see docs/tenants.md for its form"
        ) from None
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise SettingsError(f"the keys file {path} is wrong at {where}: {first['msg']}. See docs/tenants.md") from None
    _check(path, [key for profile in profiles.values() for key in profile.keys])
    return Keyring(profiles)


def _check(path: Path, given: list[str]) -> None:
    plain = [key for key in given if not HASHED.fullmatch(key)]
    if plain and path.stat().st_mode & 0o077:
        raise SettingsError(f"others may read the keys in {path}: chmod 600 {path}, or store them as sha256:<hex>")
    if any(len(key) < KEY_MIN for key in plain):
        raise SettingsError(f"a key in {path} is shorter than {KEY_MIN} characters, or no sha256:<64 hex digits>")
    if len({_digest(key) for key in given}) < len(given):
        raise SettingsError(f"a key stands twice in {path}: give each one profile")
