"""A saved state as bytes: what is written is read, and whatever is damaged is found before it is used."""

from __future__ import annotations

from pathlib import Path

import msgpack
import pytest

from pilotfish.cache import state_file
from pilotfish.cache.model_build import ModelBuild
from pilotfish.cache.prefix_map import pack
from pilotfish.cache.state_file import Header, describe, headers, read_header, read_state, write
from pilotfish.protocol.errors import BuildMismatch, ModelError, StateError

BUILD = ModelBuild(weights="a" * 64, kv="f16", engine="llama-cpp-python 0.3.36")
KEY = pack(range(40))
STATE = memoryview(bytes(range(256)) * 9)


def written(path: Path, *states: memoryview, build: ModelBuild = BUILD) -> bytes:
    with path.open("wb") as file:
        for state in states:
            write(file, describe(build, "tiny", KEY, state), state)
    return path.read_bytes()


def read(path: Path) -> tuple[Header, memoryview]:
    with path.open("rb") as file:
        header = read_header(file)
        return header, read_state(file, header)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "a.kv"


def test_what_is_written_is_read(path: Path) -> None:
    data = written(path, STATE)
    header, state = read(path)
    assert (header.build, header.model, header.key, header.tokens) == (BUILD, "tiny", KEY, 40)
    assert state == STATE
    assert state_file.size(header) == len(data)


def test_an_export_is_one_state_after_the_other(path: Path) -> None:
    states = [STATE, STATE[:7], STATE[9:]]
    written(path, *states)
    with path.open("rb") as file:
        assert [header.n_bytes for header in headers(file)] == [len(state) for state in states]
    with path.open("rb") as file:
        assert [read_state(file, header) for header in headers(file)] == states


def test_a_file_cut_short_anywhere_is_refused(path: Path) -> None:
    whole = written(path, STATE)
    for size in [*range(0, 300, 7), len(whole) - len(STATE), len(whole) - 1]:
        path.write_bytes(whole[:size])
        with pytest.raises(StateError, match=r"cut short|header|does not begin"):
            read(path)


def test_a_flipped_bit_anywhere_is_found(path: Path) -> None:
    whole = written(path, STATE)
    for at in [*range(len(whole) - len(STATE)), *range(len(whole) - len(STATE), len(whole), 97), len(whole) - 1]:
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        with pytest.raises(StateError):
            read(path)


def test_something_else_is_refused(path: Path) -> None:
    for data in (b"", b"GGUF" * 99, b"PFSTATE1\xff\xff\xff\xff" + bytes(99), b"PFSTATE1" + bytes(99)):
        path.write_bytes(data)
        with pytest.raises(StateError):
            read(path)


def test_another_form_is_told_from_damage(path: Path) -> None:
    whole = written(path, STATE)
    path.write_bytes(whole.replace(b"PFSTATE1", b"PFSTATE2", 1))
    with pytest.raises(BuildMismatch, match="another version of pilotfish"):
        read(path)


@pytest.mark.parametrize(
    "head",
    [
        b"\xc1",
        msgpack.packb([1, 2]),
        msgpack.packb({"key": b"1234"}),
        msgpack.packb({**describe(BUILD, "m", KEY, STATE).model_dump(), "n_bytes": -1}),
        msgpack.packb({**describe(BUILD, "m", KEY, STATE).model_dump(), "n_bytes": 2**60}),
        msgpack.packb({**describe(BUILD, "m", KEY, STATE).model_dump(), "later": 1}),
    ],
)
def test_a_header_of_another_form_is_refused_and_no_memory_is_taken(path: Path, head: bytes) -> None:
    path.write_bytes(b"PFSTATE1" + len(head).to_bytes(4, "little") + head + state_file._sum(head) + bytes(STATE))
    with pytest.raises(StateError, match=r"another version|cut short"):
        read(path)


def test_builds_name_the_first_field_in_which_they_differ(path: Path) -> None:
    assert BUILD.difference(BUILD) == ""
    other = BUILD.model_copy(update={"kv": "f32", "engine": "llama-cpp-python 0.3.35"})
    assert BUILD.difference(other) == "kv is f32 there and f16 here"
    weights = BUILD.model_copy(update={"weights": "b" * 64})
    assert BUILD.difference(weights) == "weights is bbbbbbbbbbbb there and aaaaaaaaaaaa here"
    assert len({BUILD.fingerprint, other.fingerprint, weights.fingerprint}) == 3


def test_a_build_is_of_a_model_file(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF and more")
    (tmp_path / "n.gguf").write_bytes(b"GGUF and else")
    one, same, other = (ModelBuild.of(tmp_path / name, "f16") for name in ("m.gguf", "m.gguf", "n.gguf"))
    assert one == same != other
    with pytest.raises(ModelError, match="no model file"):
        ModelBuild.of(tmp_path / "x.gguf", "f16")
