"""`models`: fetch models from a hub, see which are here, and whether two may work together."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pilotfish.cli.options import MODELS, AsJson, Help, takes

if TYPE_CHECKING:
    from pilotfish.cache.model_store import ModelStore, Record
    from pilotfish.protocol.fleet import Vocabulary
    from pilotfish.protocol.settings import Settings

app = typer.Typer(help="Fetch models, look at them.", no_args_is_help=True)


@app.callback()
def _models(help: Help = False) -> None: ...


@app.command()
@takes(*MODELS, "engine")
def pull(
    settings: Settings,
    names: Annotated[
        list[str] | None, typer.Argument(help="hf://ORG/REPO/FILE.gguf@REV, or hf://ORG/REPO@REV.")
    ] = None,
) -> None:
    """Fetch models, or both of a --preset, and print where they are. What broke off goes on where it stopped.

    Asks the hub what a branch stands for today; workers and agents do not, they take what the last pull found.
    """
    from pilotfish.cache.hub_fetch import fetch, model_path
    from pilotfish.cache.hub_name import hub_name
    from pilotfish.protocol.errors import UsageError

    wanted = [*(names or []), *_of_preset(settings)]
    if not wanted:
        raise UsageError("say what to fetch, as in hf://ORG/REPO/FILE.gguf, or --preset (`pilotfish models presets`)")
    store = _store(settings)
    for name in map(hub_name, wanted):
        print(model_path(str(name), store.root, offline=True) if settings.offline else fetch(name, store), flush=True)


@app.command("ls")
@takes("cache_dir")
def ls(
    settings: Settings,
    check: Annotated[bool, typer.Option("--check", help="Read every byte again and compare its SHA-256.")] = False,
    as_json: AsJson = False,
) -> None:
    """List the models that were fetched. With --check, exit code 2 at the first file that has changed since."""
    import json

    store = _store(settings)
    records = store.records()
    for record in records if check else ():
        for file in record.files:
            store.check(record, file, fully=True)
    if as_json:
        print(json.dumps([record.model_dump() | {"path": str(store.path(record, ""))} for record in records]))
        return
    for record in records:
        print(_line(store, record))
    if not records:
        print(f"no models in {store.root}: `pilotfish models pull` fetches some; the demo pair is part of pilotfish")


def _line(store: ModelStore, record: Record) -> str:
    size = sum(file.bytes for file in record.files.values()) / 1e9
    revisions = ", ".join(record.revisions) or "-"
    what = "folder" if record.whole else ", ".join(record.files)
    return f"{record.repo}  {revisions}  {size:.2f} GB  {what}  {store.path(record, '')}"


@app.command()
def presets(as_json: AsJson = False) -> None:
    """List the pairs that --preset knows: draft, target for vLLM, target for llama.cpp."""
    import json
    from dataclasses import asdict

    from pilotfish.cache.presets import PRESETS

    if as_json:
        print(json.dumps({name: asdict(pair) for name, pair in PRESETS.items()}))
        return
    for name, pair in PRESETS.items():
        print(
            f"{name}\n  draft      {pair.draft}\n  vllm       {pair.target_vllm}\n  llamacpp   {pair.target_llamacpp}"
        )


@app.command("check-pair")
@takes(*MODELS, "engine")
def check_pair(
    settings: Settings,
    draft: Annotated[str, typer.Argument(help="GGUF file, model folder or hf://…; unset: the demo's.")] = "",
    target: Annotated[str, typer.Argument(help="GGUF file, model folder or hf://…; unset: the demo's.")] = "",
    as_json: AsJson = False,
) -> None:
    """Compare two tokenizers id by id. Exit code 2 and the first difference if they do not fit."""
    import json

    from pilotfish.demo import pair
    from pilotfish.protocol import fleet

    names = _of_preset(settings) or [draft, target]
    ours, theirs = map(
        vocabulary, (_path(settings, names[0], pair.DRAFT_DIR), _path(settings, names[1], pair.TARGET_DIR))
    )
    fleet.check_pair(ours, theirs, (f"draft {names[0] or 'demo'}", f"target {names[1] or 'demo'}"))
    alike = min(len(ours), len(theirs))
    print(json.dumps({"ok": True, "tokens_alike": alike}) if as_json else f"ok, {alike} tokens alike")


def _path(settings: Settings, named: str, demo: Path) -> Path:
    from pilotfish.cache.hub_fetch import model_path
    from pilotfish.protocol.home import expand_user

    return model_path(expand_user(named), _store(settings).root, offline=settings.offline) if named else demo


def _of_preset(settings: Settings) -> list[str]:
    """Draft and target of --preset, for the engine that would run here."""
    from pilotfish.cache.presets import with_preset
    from pilotfish.cloud_worker.launch import choose_engine

    if settings.preset is None:
        return []
    chosen = with_preset(settings, choose_engine(settings.engine))
    return [chosen.draft_model or "", chosen.target_model or ""]


def _store(settings: Settings) -> ModelStore:
    from pilotfish.cache.model_store import ModelStore
    from pilotfish.demo.pair import fetched_dir

    return ModelStore(fetched_dir(settings.cache_dir))


def vocabulary(path: Path) -> Vocabulary:
    """What every id stands for. Raises ModelError for a path that is no model."""
    from pilotfish.protocol.errors import ModelError

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
