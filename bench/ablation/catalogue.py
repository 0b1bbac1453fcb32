"""Which runs there are, and how far each is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pilotfish.bench.ablation import manifest as manifests
from pilotfish.bench.ablation import records


def runs(folder: Path) -> list[dict[str, Any]]:
    """Every run below a folder, the oldest first."""
    found = [described(path.parent) for path in folder.glob(f"*/{manifests.FILE}")]
    return sorted(found, key=lambda one: (one["begun"], one["folder"]))


def described(folder: Path) -> dict[str, Any]:
    """One run in a line. Raises UsageError if the folder holds none."""
    manifest, known = manifests.read(folder), records.read(folder)
    experiment = manifest["experiment"]
    cells = len(experiment["variants"]) * len(experiment["rtt_ms"]) * experiment["seeds"]
    return {
        "folder": str(folder),
        "begun": manifest["sittings"][0]["started"],
        "finished": manifest["finished"],
        "requests": len(known),
        "wanted": cells * experiment["prompts"]["asked"],
        "failed": sum(bool(record["failure"]) for record in known),
        "variants": list(experiment["variants"]),
        "rtt_ms": experiment["rtt_ms"],
        "prompts": experiment["prompts"]["name"],
    }
