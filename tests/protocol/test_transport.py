"""TLS wherever a network is between us and Redis, certificates checked, and each refusal a sentence."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import redis as sync_redis
from arq.connections import ArqRedis

from helpers import wait_until_sync
from logins import server_version
from pilotfish.cli.redis_server import find_program, free_port
from pilotfish.cli.redis_url import redis_url as url_of
from pilotfish.cloud_worker.arq_pool import arq_pool
from pilotfish.protocol.broker import connect, ping
from pilotfish.protocol.errors import BrokerUnreachable, SettingsError
from pilotfish.protocol.settings import load
from pilotfish.protocol.transport import checked, is_loopback


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.8.9.1", "[::1]"])
def test_on_this_machine_nothing_is_asked(host: str) -> None:
    url = f"redis://:secret@{host}:6379/0"
    assert checked(url) == url


@pytest.mark.parametrize("url", ["unix:///run/redis.sock", "redis:///0", "redis://"])
def test_a_socket_and_redis_own_default_host_are_this_machine(url: str) -> None:
    assert checked(url) == url


@pytest.mark.parametrize(
    "host", ["redis", "10.0.0.3", "example.com", "localhost.example.com", "[2001:db8::1]", "0.0.0.0"]
)
def test_elsewhere_plaintext_is_refused_unless_told_otherwise(host: str) -> None:
    url = f"redis://me:secret@{host}:6379/0"
    with pytest.raises(SettingsError, match="in the clear: use rediss://.*--allow-plaintext") as caught:
        checked(url)
    assert "secret" not in str(caught.value)
    assert checked(url, allow_plaintext=True) == url


@pytest.mark.parametrize("option", ["ssl_cert_reqs=none", "ssl_cert_reqs=optional", "ssl_check_hostname=false"])
def test_checks_of_certificates_cannot_be_switched_off(option: str) -> None:
    with pytest.raises(SettingsError, match=r"switches ssl_\w+ off.*--tls-ca"):
        checked(f"rediss://host:6379/0?{option}")


def test_the_url_brings_the_checks_with_it(tmp_path: Path) -> None:
    ca = tmp_path / "ca.pem"
    ca.write_text("a certificate")
    url = checked("rediss://me:p%40ss@host:1/3?socket_timeout=2", ca=ca)
    assert url.startswith("rediss://me:p%40ss@host:1/3?socket_timeout=2&")
    about = connect(url).connection_pool.connection_kwargs
    assert (about["ssl_cert_reqs"], about["ssl_check_hostname"], about["ssl_ca_certs"]) == ("required", True, str(ca))
    assert (about["password"], about["db"]) == ("p@ss", 3)
    assert checked(url, ca=ca) == url, "a child process checks what its parent did"


def test_a_ca_that_is_no_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="there is no file .*gone.pem: tls_ca names"):
        checked("rediss://host/0", ca=tmp_path / "gone.pem")


def test_what_is_no_url_is_named() -> None:
    with pytest.raises(SettingsError, match="is no URL"):
        checked("rediss://host:port/0")


@pytest.mark.parametrize(("host", "here"), [("localhost", True), ("::1", True), ("host", False), ("", False)])
def test_loopback_is_a_matter_of_names(host: str, here: bool) -> None:
    assert is_loopback(host) is here


def test_every_command_asks() -> None:
    with pytest.raises(SettingsError, match="in the clear"):
        url_of(load({"redis_url": "redis://far:1/0"}, environ={}))
    assert url_of(load({"redis_url": "redis://far:1/0", "allow_plaintext": True}, environ={})) == "redis://far:1/0"


# --- a Redis that speaks TLS -----------------------------------------------------------------------------------


@dataclass
class Secured:
    port: int
    ca: Path
    other_ca: Path


def certify(folder: Path, name: str, subject: str, *signed_by: str) -> Path:
    """A key and a certificate for localhost, valid for a day."""
    made = folder / f"{name}.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "1",
         "-subj", f"/CN={subject}", "-addext", f"subjectAltName=DNS:{subject}",
         "-keyout", str(folder / f"{name}.key"), "-out", str(made)],
        check=True, capture_output=True,
    )  # fmt: skip
    return made


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    program = find_program()
    if not shutil.which("openssl") or server_version(program) < 7:
        pytest.skip("no openssl to make a certificate with, or a Redis without TLS")
    folder, port = tmp_path_factory.mktemp("tls"), free_port()
    ca, other = certify(folder, "here", "localhost"), certify(folder, "other", "localhost")
    options = ["--port", "0", "--tls-port", str(port), "--bind", "127.0.0.1", "--save", "", "--tls-auth-clients", "no",
               "--tls-cert-file", str(ca), "--tls-key-file", str(ca.with_suffix(".key")),
               "--tls-ca-cert-file", str(ca)]  # fmt: skip
    process = subprocess.Popen([str(program), *options], stdout=subprocess.DEVNULL)
    try:
        url = checked(f"rediss://localhost:{port}/0", ca=ca)
        with sync_redis.Redis.from_url(url) as client:
            wait_until_sync(lambda: answers(client, process), "the Redis with TLS to answer")
        yield Secured(port, ca, other)
    finally:
        process.kill()
        process.wait()


def answers(client: sync_redis.Redis, process: subprocess.Popen[bytes]) -> bool:
    assert process.poll() is None, "the Redis with TLS ended"
    try:
        return bool(client.ping())
    except sync_redis.RedisError:
        return False


async def test_both_sides_speak_tls_to_the_one_whose_certificate_fits(secured: Secured) -> None:
    url = checked(f"rediss://localhost:{secured.port}/0", ca=secured.ca)
    async with connect(url) as redis:
        await ping(redis, url)
    pool: ArqRedis = arq_pool(url, "arq:q")
    await ping(pool, url)
    await pool.aclose(close_connection_pool=True)


@pytest.mark.parametrize("why", ["another CA", "the system's CAs", "another name", "no TLS"])
async def test_and_to_nobody_else(secured: Secured, why: str) -> None:
    name = "127.0.0.1" if why == "another name" else "localhost"
    ca = {"another CA": secured.other_ca, "the system's CAs": None}.get(why, secured.ca)
    url = checked(f"{'redis' if why == 'no TLS' else 'rediss'}://{name}:{secured.port}/0", ca=ca)
    async with connect(url) as redis:
        with pytest.raises(BrokerUnreachable, match="(?i)certificate|closed|reset|refused|lost") as caught:
            await ping(redis, url)
    if why != "no TLS":
        assert "certificate verify failed" in str(caught.value)
        assert "--tls-ca" in str(caught.value)
