from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pilotfish.cache.hub_name import HubName, hub_name, is_hub_name, shards
from pilotfish.protocol.errors import ModelError

PARTS = st.from_regex(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,10}", fullmatch=True)
FILES = st.lists(PARTS, max_size=3).map("/".join)


@given(PARTS, PARTS, FILES, PARTS)
def test_what_is_written_reads_as_it_was(org: str, repo: str, file: str, revision: str) -> None:
    name = HubName(org, repo, file, revision)
    assert hub_name(str(name)) == name


def test_a_revision_may_be_a_branch_below_another() -> None:
    assert hub_name("hf://a/b/c.gguf@refs/pr/1") == HubName("a", "b", "c.gguf", "refs/pr/1")


@pytest.mark.parametrize(
    "text", ["hf://", "hf://a", "hf://a/b/", "hf://a/b@", "hf://a/../x", "hf://a/b/../c", "hf:/a/b"]
)
def test_what_is_no_name_is_refused_with_the_form(text: str) -> None:
    with pytest.raises(ModelError, match="write hf://ORG/REPO/FILE.gguf@REVISION, or hf://ORG/REPO@REVISION"):
        hub_name(text)


@pytest.mark.parametrize("path", ["x.gguf", "~/models/x", "/hf/x", "C:hf://"])
def test_paths_are_no_names(path: str) -> None:
    assert not is_hub_name(path)


def test_a_split_gguf_is_all_its_parts() -> None:
    assert shards("q4/m-00001-of-00003.gguf") == [f"q4/m-0000{part}-of-00003.gguf" for part in (1, 2, 3)]
    assert shards("m-00002-of-00003.gguf") == ["m-00002-of-00003.gguf"]
    assert shards("m.gguf") == ["m.gguf"]


def test_a_folder_is_weights_last_and_no_pickles() -> None:
    there = ["model.safetensors", "merges.txt", "pytorch_model.bin", "x.py", "onnx/model.safetensors", "config.json"]
    assert hub_name("hf://a/b").wanted(there) == ["config.json", "merges.txt", "model.safetensors"]
