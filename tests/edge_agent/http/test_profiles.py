"""Keys with profiles, over the real application: what mode, what budget, how often."""

from __future__ import annotations

import hashlib
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import openai
import pytest
from http_rigs import Served, alone, api, served
from websockets.asyncio.client import connect

import pilotfish
from pilotfish.edge_agent.http import profiles
from pilotfish.edge_agent.http.profiles import Bearer, Keyring, Profile
from pilotfish.edge_agent.http.serve import serve_api
from pilotfish.edge_agent.http.service import Service
from pilotfish.protocol.errors import Overloaded, SettingsError
from pilotfish.protocol.http_guard import Access
from pilotfish.protocol.settings import Settings

OWNER, KITCHEN = "the owner's own key", "a key for the kitchen"


def hashed(key: str) -> str:
    return f"sha256:{hashlib.sha256(key.encode()).hexdigest()}"


@asynccontextmanager
async def guarded(one: Served, **profile: object) -> AsyncIterator[Served]:
    """The same service behind the owner's key and one with this profile; the client has the latter."""
    ring = Keyring({"kitchen": Profile.model_validate({"keys": (hashed(KITCHEN),), **profile})})
    async with served(one.service, Access(key=OWNER, bearer=ring.bearer)) as behind:
        behind.client.api_key = KITCHEN
        yield behind


async def test_over_its_rate_a_key_is_told_when_to_come_back() -> None:
    async with alone() as one, guarded(one, requests_per_minute=2) as behind:
        for _ in range(2):
            await behind.chat(max_tokens=3)
        with pytest.raises(openai.RateLimitError) as refused:
            await behind.chat(max_tokens=3)
        assert 1 <= int(refused.value.response.headers["retry-after"]) <= 30
        assert "profile kitchen allows 2 requests a minute" in str(refused.value)
        behind.client.api_key = OWNER
        await behind.chat(max_tokens=3)


async def test_a_websocket_has_the_same_rate() -> None:
    async with alone() as one, guarded(one, requests_per_minute=1) as behind:
        about = {"Authorization": f"Bearer {KITCHEN}"}
        url = behind.url.replace("http", "ws") + "/v1/stream"
        async with connect(url, additional_headers=about) as socket:
            await socket.send('{"model": "fake", "prompt": "hello", "max_tokens": 2}')
            while '"finished"' not in str(await socket.recv()):
                pass
            await socket.send('{"model": "fake", "prompt": "hello", "max_tokens": 2}')
            assert "rate_limit_exceeded" in str(await socket.recv())


async def test_a_profile_says_the_mode_and_another_is_refused(redis_url: str) -> None:
    async with api(redis_url) as one, guarded(one, mode="cloud_only") as behind:
        answer = await behind.chat(max_tokens=4)
        assert answer.choices[0].pilotfish["mode"] == "cloud_only"
        with pytest.raises(openai.BadRequestError, match="run in mode cloud_only"):
            await behind.chat(max_tokens=4, extra_body={"pilotfish": {"mode": "exact"}})


async def test_a_profile_bounds_the_budget_of_disagreement() -> None:
    from pilotfish.edge_agent.http.bodies import CompletionBody
    from pilotfish.edge_agent.http.calls import Call

    async with alone() as one:
        bearer = Bearer("kitchen", Profile(max_disagreement=0.05, keys=("k",)))
        body = CompletionBody(model="fake", prompt="hello")
        with_profile = Call(one.service, body, "", bearer=bearer)._task((1,))
        assert with_profile.max_disagreement == 0.05
        assert Call(one.service, body, "")._task((1,)).max_disagreement != 0.05


async def test_a_key_with_a_profile_is_no_operators() -> None:
    async with alone() as one, guarded(one) as behind, httpx.AsyncClient(base_url=behind.url) as http:
        kitchen = {"Authorization": f"Bearer {KITCHEN}"}
        assert (await http.get("/v1/models", headers=kitchen)).status_code == 200
        for path in ("/metrics", "/health", "/ready", "/openapi.json"):
            assert (await http.get(path, headers=kitchen)).status_code == 401, path
        assert (await http.post("/drain", headers=kitchen)).status_code == 401
        assert (await http.get("/v1/models", headers={"Authorization": "Bearer nobody's"})).status_code == 401
        assert (await http.get("/v1/models")).status_code == 401


# --- the file ------------------------------------------------------------------------------------------------


def written(folder: Path, text: str, mode: int = 0o600) -> Path:
    path = folder / "keys.toml"
    path.write_text(text)
    path.chmod(mode)
    return path


def test_a_file_of_hashes_may_be_read_by_anyone_and_one_of_keys_only_by_its_owner(tmp_path: Path) -> None:
    text = f'[profiles.kitchen]\nrequests_per_minute = 5\nkeys = ["{hashed(KITCHEN)}"]\n'
    bearer = profiles.read(written(tmp_path, text, 0o644)).bearer(["nonsense", KITCHEN])
    assert bearer
    assert (bearer.name, bearer.profile.requests_per_minute) == ("kitchen", 5)
    plain = text.replace(hashed(KITCHEN), KITCHEN)
    assert profiles.read(written(tmp_path, plain)).bearer([KITCHEN])
    with pytest.raises(SettingsError, match="chmod 600"):
        profiles.read(written(tmp_path, plain, 0o640))


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("[profiles.a]\nkeys = []\n", "profiles.a.keys"),
        ('[profiles.a]\nkeys = ["short"]\n', "shorter than 16"),
        ('[profiles.a]\nkeys = ["0123456789abcdef"]\nbudget = 3\n', "profiles.a.budget"),
        ('[profiles.a]\nkeys = ["0123456789abcdef"]\nmode = "fast"\n', "profiles.a.mode"),
        ('[profiles.a]\nkeys = ["0123456789abcdef"]\n[profiles.b]\nkeys = ["0123456789abcdef"]\n', "stands twice"),
        ("profiles", "cannot be read"),
    ],
)
def test_what_a_file_gets_wrong_is_said_without_a_key(tmp_path: Path, text: str, sentence: str) -> None:
    with pytest.raises(SettingsError, match=sentence) as refused:
        profiles.read(written(tmp_path, text))
    assert "0123456789abcdef" not in str(refused.value)


async def test_a_keys_file_needs_the_owners_key_too(tmp_path: Path) -> None:
    path = written(tmp_path, f'[profiles.a]\nkeys = ["{KITCHEN}"]\n')
    async with alone() as one:
        with pytest.raises(SettingsError, match="PILOTFISH_API_KEY"):
            async with serve_api(Settings(serve_port=0, keys_file=path), Service(one.service.agent), lambda: None):
                pass
        settings = Settings.model_validate({"serve_port": 0, "keys_file": path, "api_key": OWNER})
        async with serve_api(settings, one.service, lambda: None) as url, httpx.AsyncClient(base_url=url) as http:
            answer = await http.get("/v1/models", headers={"Authorization": f"Bearer {KITCHEN}"})
            assert answer.status_code == 200


def test_a_bucket_fills_with_time() -> None:
    now = [0.0]
    bearer = Bearer("a", Profile(requests_per_minute=6, keys=("k",)), lambda: now[0])
    for _ in range(6):
        bearer.take()
    with pytest.raises(Overloaded) as refused:
        bearer.take()
    assert refused.value.retry_after_s == 10
    now[0] += 10
    bearer.take()
    with pytest.raises(Overloaded):
        bearer.take()


def test_the_example_in_the_docs_is_read(tmp_path: Path) -> None:
    page = (Path(pilotfish.__file__).parent / "docs/tenants.md").read_text()
    (example,) = re.findall(r"```toml\n(.*?)```", page, re.S)
    profiles.read(written(tmp_path, example, 0o644))
