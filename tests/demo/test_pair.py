from __future__ import annotations

import json
from math import prod
from pathlib import Path

import pytest

from pilotfish.demo import pair as demo_pair
from pilotfish.demo.convert import tensors

FOLDERS = {"target": demo_pair.TARGET_DIR, "draft": demo_pair.DRAFT_DIR}
PARAMETERS = {"target": (10e6, 13e6), "draft": (1e6, 3e6)}


@pytest.mark.parametrize("name", FOLDERS)
def test_sizes_are_those_promised(name: str) -> None:
    config = json.loads((FOLDERS[name] / "config.json").read_text())
    n_parameters = sum(prod(values.shape) for _, values in tensors(FOLDERS[name] / "model.safetensors"))
    assert PARAMETERS[name][0] <= n_parameters <= PARAMETERS[name][1]
    assert config["head_dim"] == 64
    assert config["max_position_embeddings"] >= 4608
    assert config["architectures"] == ["Qwen3ForCausalLM"]


def test_models_stay_small_in_the_repository() -> None:
    assert sum(path.stat().st_size for path in demo_pair.MODELS_DIR.rglob("*") if path.is_file()) < 30e6


def test_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PILOTFISH_CACHE_DIR", str(tmp_path / "own"))
    assert demo_pair.cache_dir() == tmp_path / "own"
    monkeypatch.delenv("PILOTFISH_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert demo_pair.cache_dir() == tmp_path / "xdg" / "pilotfish"


def test_gguf_files_are_made_at_first_use(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    monkeypatch.setenv("PILOTFISH_CACHE_DIR", str(tmp_path))
    assert demo_pair.draft_gguf().read_bytes()[:4] == b"GGUF"
    assert demo_pair.draft_gguf("f16").stat().st_size < demo_pair.draft_gguf().stat().st_size


@pytest.mark.torch
@pytest.mark.slow
def test_target_answers_and_draft_answers_less_well() -> None:
    torch = pytest.importorskip("torch")
    from pilotfish.demo import evaluate, store
    from pilotfish.demo import tokenizer as tok

    torch.set_num_threads(1)
    rows = [row for row in evaluate.questions() if row["answer"] is not None][::3]
    tokenizer = tok.load(demo_pair.TARGET_DIR)
    right = {name: evaluate.accuracy(store.load(folder), tokenizer, rows) for name, folder in FOLDERS.items()}
    overall = {name: sum(shares.values()) / len(shares) for name, shares in right.items()}
    assert overall["target"] >= 0.85
    assert min(right["target"].values()) >= 0.5  # six or seven questions a family here; all of them: `evaluate`
    assert overall["draft"] < overall["target"] - 0.05
