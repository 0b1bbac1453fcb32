"""The vocabulary of a Hugging Face model directory: the bytes behind every id, the chat template, the stop ids.

Needs only `tokenizer.json` and its neighbours; knows byte-level BPE (Qwen, Llama 3, GPT-2) and nothing of engines.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pilotfish.protocol.errors import ModelError
from pilotfish.protocol.fleet import Vocabulary


def read_vocabulary(model_dir: Path) -> Vocabulary:
    """Raises ModelError when the directory has no tokenizer.json, or one that is not byte-level BPE."""
    tokenizer = _json(model_dir / "tokenizer.json")
    config = _json(model_dir / "config.json")
    model = tokenizer.get("model", {})
    if model.get("type") != "BPE" or not isinstance(model.get("vocab"), dict):
        raise ModelError(f"{model_dir}: tokenizer.json is not byte-level BPE, the only kind pilotfish pairs today")
    try:
        table = _table(tokenizer, int(config["vocab_size"]))
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise ModelError(
            f"{model_dir}: tokenizer.json is not byte-level BPE ({error!r}), the only kind pilotfish pairs today"
        ) from None
    return Vocabulary(tuple(table), _chat_template(model_dir), _stop_ids(model_dir, config))


def _table(tokenizer: dict[str, Any], size: int) -> list[bytes]:
    table, alphabet = [b""] * size, byte_alphabet()
    for text, index in tokenizer["model"]["vocab"].items():
        table[index] = bytes(alphabet[character] for character in text)
    for added in tokenizer.get("added_tokens", ()):
        table[added["id"]] = added["content"].encode()
    return table


def _json(path: Path) -> dict[str, Any]:
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path} does not exist: a vLLM target is a Hugging Face model directory") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read: {error}") from None
    if not isinstance(loaded, dict):
        raise ModelError(f"{path} holds no JSON object")
    return loaded


def _chat_template(model_dir: Path) -> str:
    beside = model_dir / "chat_template.jinja"
    if beside.exists():
        return beside.read_text(encoding="utf-8")
    template = _json(model_dir / "tokenizer_config.json").get("chat_template", "")
    return template if isinstance(template, str) else ""


def _stop_ids(model_dir: Path, config: dict[str, Any]) -> tuple[int, ...]:
    generation = model_dir / "generation_config.json"
    named = (_json(generation) if generation.exists() else config).get("eos_token_id", config.get("eos_token_id"))
    if named is None:
        return ()
    return tuple(named) if isinstance(named, list) else (int(named),)


def byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins for bytes: character -> byte."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
