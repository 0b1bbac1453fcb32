"""What an ablation switches off: a preset is what it changes in the settings, and nothing else.

    baseline                 everything on
    no_kv_cache              one part off
    no_kv_cache+window=1     parts join with "+", any setting is a part: a variant

Everything is a change to the baseline, so parts can be joined. Knows settings; nothing of processes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from pilotfish.protocol.errors import UsageError
from pilotfish.protocol.settings import Settings, load

BASELINE: Final = "baseline"
BASE: Final[dict[str, Any]] = {"mode": "gated"}  # every other part is on by default


@dataclass(frozen=True, slots=True)
class Preset:
    """Settings that differ from the baseline. `routed`: each request goes whole to the edge or to the cloud."""

    about: str
    settings: Mapping[str, Any]
    routed: bool = False


PRESETS: Final[dict[str, Preset]] = {
    BASELINE: Preset("gated, everything on", {}),
    "no_confidence": Preset(
        "no gate, no stop rule: a fixed K, one round at a time, all of it verified",
        {"mode": "exact", "drafting": "fixed", "draft_tokens": 4, "window": 1},
    ),
    "no_draft_verify": Preset(
        "each request goes whole to the edge or to the cloud, by the draft's own probability of its first tokens",
        {"mode": "cloud_only", "strategy": "max_prob"},
        routed=True,
    ),
    "no_kv_cache": Preset(
        "nothing computed is used again: no edge cache, no residency, no prefix cache",
        {"kv_reuse": False},
    ),
    "edge_only": Preset("the draft alone", {"mode": "edge_only"}),
    "cloud_only": Preset("the target alone, streaming", {"mode": "cloud_only"}),
}


@dataclass(frozen=True, slots=True)
class Variant:
    """A named way to run: all the settings it sets."""

    name: str
    settings: Mapping[str, Any]
    routed: bool = False

    @property
    def learns(self) -> bool:
        """Whether it decides by what earlier verdicts taught it."""
        return self.settings.get("mode") == "gated"

    def resolved(self, common: Mapping[str, Any]) -> Settings:
        """All settings, those in common with other variants first. Raises SettingsError."""
        return load({**common, **self.settings})


def variants(modes: str) -> list[Variant]:
    """Of a comma-separated list, or "all" presets; the baseline is always among them, first. Raises UsageError."""
    names = list(PRESETS) if modes.strip() == "all" else [name.strip() for name in modes.split(",") if name.strip()]
    return [variant(name) for name in dict.fromkeys([BASELINE, *names])]


def variant(name: str) -> Variant:
    """One variant by its name, parts joined by "+". Raises UsageError for a part that is none."""
    settings, routed = dict(BASE), False
    for part in name.split("+"):
        changes, whole = _part(part.strip())
        settings |= changes
        routed = routed or whole
    return Variant(name, settings, routed)


def _part(part: str) -> tuple[Mapping[str, Any], bool]:
    if part in PRESETS:
        return PRESETS[part].settings, PRESETS[part].routed
    setting, equals, value = part.partition("=")
    if not equals:
        raise UsageError(f"there is no mode {part!r}: choose {', '.join(PRESETS)}, or SETTING=VALUE")
    load({setting: value})  # names a wrong setting or value, and what would be right
    return {setting: value}, False
