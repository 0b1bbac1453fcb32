"""`models check-pair`: may these two work together? They may if every id stands for the same bytes in both."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pilotfish.cli.options import AsJson, Help
from pilotfish.protocol.errors import ModelError

if TYPE_CHECKING:
    from pilotfish.protocol.fleet import Vocabulary

app = typer.Typer(help="Look at model files.", no_args_is_help=True)


@app.callback()
def _models(help: Help = False) -> None: ...


@app.command("check-pair")
def check_pair(
    draft: Annotated[str, typer.Argument(help="GGUF file or model folder; unset: the demo's.")] = "",
    target: Annotated[str, typer.Argument(help="GGUF file or model folder; unset: the demo's.")] = "",
    as_json: AsJson = False,
) -> None:
    """Compare two tokenizers id by id. Exit code 2 and the first difference if they do not fit."""
    import json

    from pilotfish.protocol import fleet

    ours, theirs = vocabulary(_path(draft, "draft")), vocabulary(_path(target, "target"))
    fleet.check_pair(ours, theirs, (f"draft {draft or 'demo'}", f"target {target or 'demo'}"))
    alike = min(len(ours), len(theirs))
    print(json.dumps({"ok": True, "tokens_alike": alike}) if as_json else f"ok, {alike} tokens alike")


def _path(given: str, side: str) -> Path:
    from pilotfish.demo import pair

    if given:
        return Path(given).expanduser()
    return pair.DRAFT_DIR if side == "draft" else pair.TARGET_DIR


def vocabulary(path: Path) -> Vocabulary:
    """What every id stands for. Raises ModelError for a path that is no model."""
    if path.is_dir():
        from pilotfish.cloud_worker.engines.hf_vocabulary import read_vocabulary

        return read_vocabulary(path)
    if not path.exists():
        raise ModelError(f"{path} does not exist: name a GGUF file or a model folder")
    from pilotfish.cache.llama_context import LlamaModel
    from pilotfish.protocol.fleet import Vocabulary

    model = LlamaModel(path, vocab_only=True)
    try:
        return Vocabulary(tuple(model.token_bytes))
    finally:
        model.close()
