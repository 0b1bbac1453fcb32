"""docker/Dockerfile, read: stages, users, sources. Nothing here builds an image."""

from __future__ import annotations

import fnmatch
import re

import pytest

from composed import ROOT, compose

TEXT = re.sub(r"\\\n\s*", "", (ROOT / "docker/Dockerfile").read_text())
STAGES: dict[str, tuple[str, list[str]]] = {
    name: (base, body.strip().splitlines())
    for base, name, body in re.findall(r"(?m)^FROM (\S+) AS (\S+)\n((?:(?!FROM ).*\n?)*)", TEXT)
}
IMAGES = ["cpu", "gpu"]


def lines(stage: str) -> list[str]:
    """A stage's instructions after those of the stages it is built from."""
    base, own = STAGES[stage]
    return (lines(base) if base in STAGES else []) + own


@pytest.mark.parametrize("image", IMAGES)
def test_an_image_is_not_root_and_holds_no_compiler_of_cpp(image: str) -> None:
    users = [line.split()[1] for line in lines(image) if line.startswith("USER ")]
    assert users[-1] == "pilotfish"
    assert not [line for line in lines(image) if "g++" in line or "pip install" in line], "built in a stage of its own"
    assert [line for line in lines(image) if re.match(r"COPY --from=build-\w+ /opt/pilotfish /opt/pilotfish", line)]


def test_what_is_compiled_while_it_runs_is_not_loaded_from_tmp() -> None:
    """A tmpfs is mounted noexec by default, and torch's own place for compiled code is in /tmp."""
    told = " ".join(line for line in lines("gpu") if line.startswith("ENV "))
    assert {"TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"} <= set(re.findall(r"(\w+)=/models/", told))
    assert compose()["services"]["worker-gpu"]["tmpfs"] == ["/tmp"]


def test_bases_have_versions_and_stages_exist() -> None:
    for base, _ in STAGES.values():
        assert base in STAGES or re.search(r":\d", base)
    for stage in re.findall(r"--from=(\S+)", TEXT):
        assert stage in STAGES


def test_what_is_copied_is_there_and_let_in() -> None:
    ignored = (ROOT / ".dockerignore").read_text().split()
    for line in re.findall(r"(?m)^COPY (?!--from)(.+)$", TEXT):
        for source in line.split()[:-1]:
            assert (ROOT / source).exists(), source
            assert not any(fnmatch.fnmatch(source, pattern) for pattern in ignored)
    assert {".env", ".git", ".venv"} <= set(ignored), "secrets and history stay out of images"


def test_every_install_is_of_hashes_or_of_this_project() -> None:
    for command in re.findall(r"pip install ([^&\n]+)", TEXT):
        assert "--no-deps" in command
        assert "--require-hashes" in command or command.strip().endswith(" .")


def test_the_compose_file_builds_these_images() -> None:
    built = {service["build"]["target"] for service in compose()["services"].values() if "build" in service}
    assert built == set(IMAGES) <= STAGES.keys()
