"""How a Redis is reached: on this machine by any means, elsewhere through TLS with a checked certificate.

`checked` takes the URL as it was set and gives the one to connect to, with redis-py's own options in its query: whoever
is handed that URL needs to know nothing of TLS. Opens no connection.
"""

from __future__ import annotations

import ipaddress
from pathlib import Path
from urllib.parse import SplitResult, parse_qsl, urlencode, urlsplit, urlunsplit

from pilotfish.protocol.errors import SettingsError
from pilotfish.protocol.settings import redacted

#: query options that would weaken TLS -> the one value they may have
STRICT = {"ssl_cert_reqs": "required", "ssl_check_hostname": "true"}


def checked(url: str, *, ca: Path | None = None, allow_plaintext: bool = False) -> str:
    """The URL to connect to. Raises SettingsError for what would cross a network in the clear, or unchecked."""
    parts = _split(url)
    if parts.scheme != "rediss":
        if not (parts.scheme == "unix" or allow_plaintext or is_loopback(parts.hostname or "localhost")):
            raise SettingsError(
                f"{redacted(url)} would carry the password and every prompt in the clear: use rediss://, or "
                f"--allow-plaintext on a network where nobody listens"
            )
        return url
    options = dict(parse_qsl(parts.query))
    for name, value in STRICT.items():
        if options.setdefault(name, value).lower() != value:
            raise SettingsError(
                f"{redacted(url)} switches {name} off: leave it out, and name a private CA's file with --tls-ca"
            )
    if ca is not None:
        options["ssl_ca_certs"] = str(_readable(ca))
    return urlunsplit(parts._replace(query=urlencode(options)))


def is_loopback(host: str) -> bool:
    """Whether a host is this machine by its very name; what a name server says is not believed."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _split(url: str) -> SplitResult:
    try:
        parts = urlsplit(url)
        _ = parts.hostname, parts.port
        return parts
    except ValueError as error:
        raise SettingsError(f"{redacted(url)!r} is no URL ({error}): use rediss://user:password@host:port/0") from None


def _readable(ca: Path) -> Path:
    if not ca.is_file():
        raise SettingsError(f"there is no file {ca}: tls_ca names the CA's certificate, in PEM form")
    return ca.resolve()
