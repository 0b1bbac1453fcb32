"""GET /: the page, one file with all it needs. A policy names its own script and style by hash, and nothing else."""

from __future__ import annotations

import base64
import hashlib
import re
from functools import cache
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response

FILE = Path(__file__).with_name("page.html")


async def page(request: Request) -> Response:
    """The page; it holds no secret and shows nothing that it does not ask the API for."""
    html, policy = _read()
    return Response(html, headers={"content-type": "text/html; charset=utf-8", "content-security-policy": policy})


@cache
def _read() -> tuple[bytes, str]:
    html = FILE.read_bytes()
    return html, "; ".join(
        [
            "default-src 'none'",
            f"script-src {_hash(html, b'script')}",
            f"style-src {_hash(html, b'style')}",
            "connect-src 'self'",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
        ]
    )


def _hash(html: bytes, tag: bytes) -> str:
    found = re.findall(rb"<" + tag + rb">(.*?)</" + tag + rb">", html, re.S)
    return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(text).digest()).decode()}'" for text in found)
