"""Presets say what they switch off, and parts can be joined."""

from __future__ import annotations

import pytest

from pilotfish.bench.ablation.presets import PRESETS, variant, variants
from pilotfish.protocol.errors import SettingsError, UsageError


def test_all_are_the_presets_of_the_design() -> None:
    assert [one.name for one in variants("all")] == [
        "baseline", "no_confidence", "no_draft_verify", "no_kv_cache", "edge_only", "cloud_only",
    ]  # fmt: skip


def test_the_baseline_always_runs_and_nothing_runs_twice() -> None:
    assert [one.name for one in variants("cloud_only, edge_only,cloud_only")] == ["baseline", "cloud_only", "edge_only"]


def test_the_baseline_switches_nothing_off() -> None:
    assert not PRESETS["baseline"].settings
    assert variant("baseline").settings == {"mode": variant("baseline").settings["mode"]}


def test_every_preset_is_possible() -> None:
    for one in variants("all"):
        assert one.resolved({}).mode == one.settings["mode"]


def test_parts_join_and_the_last_one_wins() -> None:
    joined = variant("no_confidence+no_kv_cache+draft_tokens=8")
    settings = joined.resolved({"max_tokens": 9})
    assert (settings.mode, settings.kv_reuse, settings.draft_tokens, settings.max_tokens) == ("exact", False, 8, 9)
    assert variant("no_kv_cache+no_draft_verify").routed


def test_a_part_that_is_none_is_named() -> None:
    with pytest.raises(UsageError, match="there is no mode 'no_cache': choose baseline, no_confidence"):
        variants("no_cache")
    with pytest.raises(SettingsError, match="unknown setting, 'drafttokens': did you mean 'draft_tokens'"):
        variants("baseline+drafttokens=3")
    with pytest.raises(SettingsError, match="window = '99'"):
        variants("baseline+window=99")
