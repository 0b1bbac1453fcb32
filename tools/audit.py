"""Ask an advisory database about every locked version; fail for what SECURITY.md does not know.

    python tools/audit.py [edge] [cloud-cpu] [cloud-gpu] [build]

pip-audit asks, from an environment of its own below .cache. It needs a network, and an index that publishes
advisories: a mirror without them answers "not found" for every package, which counts as a failure here, not as "none".
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import venv
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
HOME = ROOT / ".cache/audit"
TOOL = "pip-audit==2.10.1"
LOCKS = ("edge", "cloud-cpu", "cloud-gpu", "build")
ID = re.compile(r"\b(?:CVE-\d{4}-\d+|GHSA(?:-\w{4}){3}|PYSEC-\d{4}-\d+)\b")
OFFLINE = "no advisories to be had here ({why}): run `make audit` where the package index's advisories can be reached"


def requirements(lock: str) -> str:
    """A lock's pins without hashes and markers; a local version such as 2.13.0+cpu is its public one."""
    text = (ROOT / f"requirements/{lock}.txt").read_text()
    return "\n".join(f"{name}=={version}" for name, version in re.findall(r"(?m)^([a-z0-9.-]+)==([^ +]+)", text)) + "\n"


def audited(lock: str) -> list[dict[str, Any]]:
    """What pip-audit says of every package of a lock. Exits with a sentence where there is no answer."""
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as pins:
        pins.write(requirements(lock))
        pins.flush()
        command = [
            str(program()),
            "-r",
            pins.name,
            "--no-deps",
            "--disable-pip",
            "-f",
            "json",
            "--progress-spinner=off",
        ]
        ran = subprocess.run(command, capture_output=True, text=True, timeout=1800)
    try:
        found: list[dict[str, Any]] = json.loads(ran.stdout)["dependencies"]
    except (ValueError, KeyError):
        sys.exit("audit: " + OFFLINE.format(why=(ran.stderr.strip().splitlines() or ["pip-audit said nothing"])[-1]))
    return found


def program() -> Path:
    """pip-audit, installed at first use."""
    found = HOME / "bin/pip-audit"
    if not found.exists():
        venv.create(HOME, with_pip=True)
        command = [str(HOME / "bin/python"), "-m", "pip", "install", "--quiet", TOOL]
        if subprocess.run(command).returncode:
            sys.exit(f"audit: {TOOL} could not be installed: run `make audit` where a package index can be reached")
    return found


def known() -> set[str]:
    """Every advisory that SECURITY.md names."""
    return set(ID.findall((ROOT / "SECURITY.md").read_text()))


def report(lock: str, found: list[dict[str, Any]], accepted: set[str]) -> list[str]:
    """A line for each advisory that nobody has looked at, and one if the database knew too few packages."""
    lines = [
        f"{lock}: {one['name']} {one['version']}: {flaw['id']}, fixed in {' '.join(flaw['fix_versions']) or 'none yet'}"
        for one in found
        for flaw in one.get("vulns", ())
        if not {flaw["id"], *flaw.get("aliases", ())} & accepted
    ]
    if skipped := [one["name"] for one in found if "skip_reason" in one]:
        why = f"{len(skipped)} of {len(found)} packages unknown: {skipped[0]} …"
        lines.append(f"{lock}: " + OFFLINE.format(why=why))
    return lines


def main(arguments: list[str]) -> int:
    """Audit the locks named, or all."""
    if unknown := set(arguments) - set(LOCKS):
        sys.exit(f"no such lock: {', '.join(sorted(unknown))} (there are {', '.join(LOCKS)})")
    accepted = known()
    lines = [line for lock in arguments or LOCKS for line in report(lock, audited(lock), accepted)]
    for line in lines:
        print(f"audit: {line}", file=sys.stderr)
    if any(", fixed in " in line for line in lines):
        print("audit: upgrade what is fixed; for the rest say in SECURITY.md why it cannot be reached", file=sys.stderr)
    if lines:
        return 1
    print(f"audit: nothing but what SECURITY.md names ({len(accepted)} advisories)")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
