"""The experiment in docs/examples runs, and is as short as it claims."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

import pilotfish

PATH = Path(pilotfish.__file__).parent / "docs/examples/draft_lengths.py"


@pytest.fixture
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("draft_lengths", PATH)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_the_example_runs(
    example: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(example, "RTTS_MS", (0, 2))
    monkeypatch.setattr(example, "LENGTHS", (2,))
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(f'{{"prompt": "go on", "family": "{number}"}}\n' for number in range(5)))
    example.main(str(tmp_path / "out"), "fake", prompts)
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 2 * 2 + 1
    assert printed[1].startswith("RTT 0 ms, no_confidence+draft_tokens=2: ")
    assert Path(printed[-1]).is_file()


def test_the_api_is_what_it_says() -> None:
    from pilotfish import bench

    assert all(getattr(bench, name) for name in bench.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        bench.nothing  # noqa: B018
