"""Write docs/licences.md: every locked dependency, its version, its licence as its own metadata states it.

    python tools/licences.py > docs/licences.md

Reads the locks and what is installed here; a locked package that is not is listed without a licence.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOCKS = ("edge", "cloud-cpu", "build", "cloud-gpu")
UNREAD = """\
## Not read

These are in `cloud-gpu.txt` only and were not installed where this page was written. NVIDIA's libraries (`nvidia-*`,
`cuda-*`) come under NVIDIA's own terms: read them before you pass on an image that holds them."""
#: what a licence file begins with, for the few whose metadata name none
BEGINNINGS = {"Permission is hereby granted, free of charge": "MIT", "Apache License": "Apache-2.0"}
COPYLEFT = re.compile(r"GPL|MPL|Mozilla|EPL|Eclipse|CDDL", re.IGNORECASE)
HEAD = """\
# Licences of dependencies

Written by `make licences` from the locks and the packages' own metadata; a test compares it with the locks. pilotfish
itself is Apache-2.0. Nothing here is linked into or copied into it: these are installed beside it. Which ones a machine
gets depends on the extras: `edge.txt` is the device and development tools, `cloud-cpu.txt` and `cloud-gpu.txt` add
vLLM, `build.txt` builds.
"""


def pins(lock: str) -> dict[str, str]:
    """Package -> pinned version."""
    return dict(re.findall(r"(?m)^([a-z0-9.-]+)==([^ ]+)", (ROOT / f"requirements/{lock}.txt").read_text()))


def locked() -> dict[tuple[str, str], list[str]]:
    """(package, version) -> the locks that have it, by name."""
    found: dict[tuple[str, str], list[str]] = {}
    for lock in LOCKS:
        for pin in pins(lock).items():
            found.setdefault(pin, []).append(lock)
    return dict(sorted(found.items()))


def licence(package: str, version: str) -> str:
    """The licence that the installed package states, SPDX where it does so; "" if this version is not installed."""
    try:
        told = metadata.distribution(package)
    except metadata.PackageNotFoundError:
        return ""
    return next(_stated(told), "none stated") if told.version == version else ""


def _stated(told: metadata.Distribution) -> Iterator[str]:
    """What it says, best source first."""
    field = {name: told.metadata.get_all(name) or [] for name in ("License-Expression", "Classifier", "License")}
    yield from field["License-Expression"]
    named = {line.rpartition(" :: ")[2] for line in field["Classifier"] if line.startswith("License :: ")}
    yield from filter(None, [", ".join(sorted(named - {"OSI Approved"}))])
    yield from [line.strip() for text in field["License"] for line in text.splitlines() if line.strip()][:1]
    for file in told.files or ():
        if "LICEN" in file.name.upper():
            text = Path(str(file.locate())).read_text(encoding="utf-8", errors="replace").lstrip()
            yield from (name for start, name in BEGINNINGS.items() if text.startswith(start))


def page() -> str:
    """The whole of docs/licences.md."""
    rows = [(name, version, licence(name, version), locks) for (name, version), locks in locked().items()]
    read = [row for row in rows if row[2]]
    copyleft = ", ".join(f"{name} ({one})" for name, _, one, _ in read if COPYLEFT.search(one))
    lines = [
        HEAD,
        f"With a copyleft of any kind: {copyleft}.",
        "",
        "| package | version | licence | locks |",
        "|---|---|---|---|",
    ]
    lines += [f"| {name} | {version} | {one} | {', '.join(locks)} |" for name, version, one, locks in read]
    unread = ", ".join(f"{name} {version}" for name, version, one, _ in rows if not one)
    return "\n".join([*lines, "", UNREAD, "", unread + "."]) + "\n"


if __name__ == "__main__":
    sys.stdout.write(page())
