"""A run goes on only with what it began with: asked, set and modelled the same."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from ablations import manifest, run_folder
from pilotfish.bench.ablation import manifest as manifests
from pilotfish.bench.ablation.experiment import Experiment, stated
from pilotfish.bench.ablation.presets import variants
from pilotfish.bench.ablation.prompts import choose
from pilotfish.protocol.errors import UsageError

MODELS = {"draft": {"model": "small", "fingerprint": "a"}, "target": {"model": "large", "id": "b"}}


def changed(told: dict[str, Any], part: str, **changes: Any) -> dict[str, Any]:
    other = deepcopy(told)
    (other[part]["baseline"] if part == "settings" else other[part]).update(changes)
    return other


def test_the_same_again_goes_on(tmp_path: Path) -> None:
    told = manifest("baseline")
    folder = run_folder(tmp_path / "run", told, [])
    assert manifests.resumed(folder, changed(told, "settings", redis_url="redis://elsewhere")) == told


@pytest.mark.parametrize(
    ("part", "changes", "complaint"),
    [
        ("experiment", {"seeds": 2}, "its seeds was 1, not 2"),
        ("settings", {"temperature": "0.7"}, 'its baseline\'s temperature was "0.0", not "0.7"'),
    ],
)
def test_another_experiment_is_refused(tmp_path: Path, part: str, changes: dict[str, Any], complaint: str) -> None:
    told = manifest("baseline")
    folder = run_folder(tmp_path / "run", told, [])
    with pytest.raises(UsageError, match=f"holds another experiment: {complaint}"):
        manifests.resumed(folder, changed(told, part, **changes))


def test_another_model_is_refused(tmp_path: Path) -> None:
    told = {**manifest("baseline"), "models": {}}
    manifests.seen(tmp_path, told, "baseline", MODELS)
    manifests.seen(tmp_path, told, "baseline", deepcopy(MODELS))
    with pytest.raises(UsageError, match="its baseline's target was .*large"):
        manifests.seen(tmp_path, told, "baseline", {**MODELS, "target": {"model": "large", "id": "c"}})


def test_a_setting_of_the_environment_is_a_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wanted() -> dict[str, Any]:
        return stated(Experiment(tmp_path), variants("baseline"), choose(None, 1, 0))

    before = wanted()
    monkeypatch.setenv("PILOTFISH_TEMPERATURE", "0.5")
    assert wanted()["settings"]["baseline"]["temperature"] == "0.5" != before["settings"]["baseline"]["temperature"]


def test_a_sitting_tells_versions_machine_and_commit() -> None:
    told = manifests.sitting()
    assert {"pilotfish", "redis", "numpy"} <= set(told["packages"])
    assert all(told[name] for name in ("started", "python", "cpu", "cores", "system"))
    assert not told["code"] or len(told["code"]["revision"]) == 40
