"""Models from a hub: real downloads over HTTP from a hub of this machine, and what can go wrong with one."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fake_hub import Hub, Repository, fake_hub
from helpers import wait_until_sync
from pilotfish.cache.hub_fetch import fetch, model_path
from pilotfish.cache.hub_name import hub_name
from pilotfish.cache.model_store import ModelStore
from pilotfish.protocol.errors import HubError, HubUnreachable, ModelError

WEIGHTS = bytes(range(256)) * 4096  # a megabyte
PARTS = {f"split-{part:05}-of-00002.gguf": bytes([part]) * 1000 for part in (1, 2)}
FOLDER = {
    "config.json": b"{}",
    "tokenizer.json": b'{"model": {}}',
    "model.safetensors": WEIGHTS,
    "consolidated.safetensors": WEIGHTS,
    "pytorch_model.bin": b"a pickle",
    "original/params.json": b"{}",
    "README.md": b"words",
}
NAME = "hf://acme/draft-GGUF/draft-q8_0.gguf"


@pytest.fixture(autouse=True)
def hf_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of huggingface_hub's own cache and tokens, which are read at its import."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    gguf = Repository({"draft-q8_0.gguf": WEIGHTS, "draft-q4_0.gguf": b"GGUF4", **PARTS}, revisions=("main", "v1"))
    there = {"acme/draft-GGUF": gguf, "acme/Target-7B": Repository(dict(FOLDER))}
    there["acme/gated"] = Repository({"x.gguf": b"GGUF"}, gated=True)
    with fake_hub(there) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        yield hub


@pytest.fixture
def store(tmp_path: Path) -> ModelStore:
    return ModelStore(tmp_path / "models")


def test_a_file_comes_once_and_is_then_at_hand_without_the_hub(hub: Hub, store: ModelStore) -> None:
    path = model_path(NAME, store.root)
    assert path.read_bytes() == WEIGHTS
    assert path == store.root / "acme" / f"draft-GGUF@{'a' * 12}" / "draft-q8_0.gguf"
    asked = len(hub.asked)
    assert model_path(NAME, store.root) == model_path(NAME, store.root, offline=True) == path
    assert len(hub.asked) == asked
    (record,) = store.records()
    assert record.files["draft-q8_0.gguf"].sha256 == hashlib.sha256(WEIGHTS).hexdigest()


def test_a_folder_is_what_vllm_reads_and_nothing_else(hub: Hub, store: ModelStore) -> None:
    folder = model_path("hf://acme/Target-7B", store.root)
    assert folder.name == f"Target-7B@{'a' * 12}"
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert store.find(hub_name("hf://acme/Target-7B")) == folder


def test_a_split_file_comes_with_all_its_parts(hub: Hub, store: ModelStore) -> None:
    first = model_path("hf://acme/draft-GGUF/split-00001-of-00002.gguf", store.root)
    assert {path.name: path.read_bytes() for path in first.parent.iterdir()} == PARTS
    (first.parent / "split-00002-of-00002.gguf").unlink()
    assert store.find(hub_name("hf://acme/draft-GGUF/split-00001-of-00002.gguf")) is None


def test_a_connection_that_breaks_is_taken_up_where_it_broke(
    hub: Hub, store: ModelStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 100_000)
    hub.break_after = [300_000]
    assert model_path(NAME, store.root).read_bytes() == WEIGHTS
    ranges = [line.split()[-1] for line in hub.downloads("draft-q8_0.gguf")]
    assert ranges == ["-", "bytes=300000-"]


@pytest.mark.slow
def test_a_download_that_was_killed_goes_on_where_it_stopped(hub: Hub, store: ModelStore) -> None:
    """Another process fetches, has a part on disk, and gets a SIGKILL while it waits for the rest."""
    hub.repositories["acme/draft-GGUF"].files["draft-q8_0.gguf"] = big = WEIGHTS * 24
    hub.break_after = [12 << 20, *[0] * 6]
    code = f"""
from pathlib import Path
from pilotfish.cache.hub_fetch import model_path
model_path({NAME!r}, Path({str(store.root)!r}))
"""
    child = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    part = store.root / "acme" / f"draft-GGUF@{'a' * 12}" / "draft-q8_0.gguf.part"
    wait_until_sync(lambda: part.exists() and part.stat().st_size >= 10 << 20, "a part on disk", timeout=30)
    child.send_signal(signal.SIGKILL)
    child.wait()
    had = part.stat().st_size
    hub.break_after.clear()
    hub.asked.clear()
    assert model_path(NAME, store.root).read_bytes() == big
    assert [line.split()[-1] for line in hub.downloads("draft-q8_0.gguf")] == [f"bytes={had}-"]


def test_two_at_once_fetch_it_once(hub: Hub, store: ModelStore) -> None:
    context = multiprocessing.get_context("spawn")
    both = [context.Process(target=model_path, args=(NAME, store.root)) for _ in range(2)]
    for one in both:
        one.start()
    for one in both:
        one.join(30)
    assert [one.exitcode for one in both] == [0, 0]
    assert len(hub.downloads("draft-q8_0.gguf")) == 1


def test_what_arrives_otherwise_than_announced_is_thrown_away(hub: Hub, store: ModelStore) -> None:
    hub.spoiled = {"draft-q8_0.gguf"}
    with pytest.raises(HubError, match=r"draft-q8_0\.gguf of acme/draft-GGUF came damaged"):
        model_path(NAME, store.root)
    hub.spoiled = set()
    assert model_path(NAME, store.root).read_bytes() == WEIGHTS
    hub.spoiled = {"tokenizer.json"}
    with pytest.raises(HubError, match=r"tokenizer\.json .* came damaged"):
        model_path("hf://acme/Target-7B", store.root)


def test_a_file_that_was_changed_is_refused_until_it_is_deleted(hub: Hub, store: ModelStore) -> None:
    path = model_path(NAME, store.root)
    path.write_bytes(WEIGHTS[:-1] + b"!")
    with pytest.raises(ModelError, match=r"is not what was fetched .* delete it and run `pilotfish models pull`"):
        model_path(NAME, store.root)
    with pytest.raises(ModelError, match="is not what was fetched"):
        fetch(hub_name(NAME), store)
    path.unlink()
    assert model_path(NAME, store.root).read_bytes() == WEIGHTS


def test_a_record_that_was_lost_is_written_anew_without_a_download(hub: Hub, store: ModelStore) -> None:
    path = model_path(NAME, store.root)
    path.parent.with_name(f"{path.parent.name}.json").unlink()
    assert model_path(NAME, store.root) == path
    assert len(hub.downloads("draft-q8_0.gguf")) == 1


def test_a_hub_that_names_no_commit_is_none(hub: Hub, store: ModelStore) -> None:
    hub.repositories["acme/draft-GGUF"].commit = "../../../../x"
    with pytest.raises(HubError, match="names no commit for .* is HF_ENDPOINT a model hub"):
        model_path(NAME, store.root)


def test_a_file_that_was_only_copied_is_read_and_taken(hub: Hub, store: ModelStore) -> None:
    path = model_path(NAME, store.root)
    os.utime(path, ns=(1, 1))
    assert model_path(NAME, store.root) == path


def test_a_branch_means_what_the_last_pull_found(hub: Hub, store: ModelStore) -> None:
    old = model_path(NAME, store.root)
    hub.repositories["acme/draft-GGUF"] = Repository({"draft-q8_0.gguf": b"GGUF newer"}, commit="b" * 40)
    assert model_path(NAME, store.root) == old
    new = fetch(hub_name(NAME), store)
    assert new.read_bytes() == b"GGUF newer"
    assert model_path(NAME, store.root) == new
    assert model_path(f"{NAME}@{'a' * 40}", store.root) == model_path(f"{NAME}@{'a' * 8}", store.root) == old


def test_what_huggingface_hub_has_is_not_fetched_again(hub: Hub, store: ModelStore, tmp_path: Path) -> None:
    snapshot = tmp_path / "hf/models--acme--draft-GGUF/snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "draft-q8_0.gguf").write_bytes(WEIGHTS)
    assert model_path(NAME, store.root).read_bytes() == WEIGHTS
    assert not hub.downloads("draft-q8_0.gguf")


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        (
            "hf://acme/nothing/x.gguf",
            r"the hub has no model acme/nothing, or it is private: check the name, or set",
        ),
        ("hf://acme/draft-GGUF/draft-q8_0.gguf@v9", r"acme/draft-GGUF has no revision v9: see its branches"),
        (
            "hf://acme/draft-GGUF/draft-q5_0.gguf",
            r"has no file draft-q5_0.gguf at main: it has draft-q\d_0.gguf, draft-q",
        ),
        ("hf://acme/draft-GGUF", r"acme/draft-GGUF has no safetensors at main: name one of its files"),
        ("hf://acme/gated/x.gguf", r"acme/gated is gated: accept its terms .* then set HF_TOKEN"),
        ("hf://acme--x/y/x.gguf", r"the hub takes no such name as acme--x/y"),
        ("hf://acme", r"names no model on a hub: write hf://ORG/REPO/FILE.gguf@REVISION"),
        ("hf://acme/draft/../../etc/passwd", r"names no model on a hub"),
    ],
)
def test_a_no_says_what_to_do(hub: Hub, store: ModelStore, name: str, sentence: str) -> None:
    with pytest.raises(ModelError, match=sentence) as caught:
        model_path(name, store.root)
    assert caught.value.exit_code == 2


def test_a_token_opens_what_is_gated(hub: Hub, store: ModelStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_good")
    assert model_path("hf://acme/gated/x.gguf", store.root).read_bytes() == b"GGUF"


def test_no_network_and_a_hub_in_trouble_are_told_apart_from_a_no(
    hub: Hub, store: ModelStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.status = 500
    with pytest.raises(HubUnreachable, match=r"answered 500 for hf://acme/draft-GGUF/draft-q8_0\.gguf: try again"):
        model_path(NAME, store.root)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(HubUnreachable, match="cannot be reached .* check the network") as caught:
        model_path(NAME, store.root)
    assert caught.value.exit_code == 3


def test_offline_asks_nobody(hub: Hub, store: ModelStore) -> None:
    with pytest.raises(
        HubError, match=r"not here in full and --offline forbids to fetch it: run `pilotfish models pull"
    ):
        model_path(NAME, store.root, offline=True)
    assert hub.asked == []


def test_a_disk_too_small_is_told_before_the_first_byte(
    hub: Hub, store: ModelStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(store.root.parent)._replace(free=100)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ModelError, match=r"needs 1049 kB more and .* has 0 kB free: make room, or set --cache-dir"):
        model_path(NAME, store.root)
    assert not hub.downloads("draft-q8_0.gguf")


def test_a_disk_that_fills_up_on_the_way_keeps_what_came(hub: Hub, store: ModelStore) -> None:
    part = store.root / "acme" / f"draft-GGUF@{'a' * 12}" / "draft-q8_0.gguf.part"
    part.parent.mkdir(parents=True)
    part.symlink_to("/dev/full")
    with pytest.raises(ModelError, match=r"the disk is full while fetching .* what came is kept"):
        model_path(NAME, store.root)


def test_a_path_is_a_path(store: ModelStore) -> None:
    assert model_path("models/x.gguf", store.root) == Path("models/x.gguf")
    assert not store.root.exists()
