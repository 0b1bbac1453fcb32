from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pilotfish.protocol.errors import SettingsError
from pilotfish.protocol.messages import Prompt, Sampling
from pilotfish.protocol.settings import Settings, allowed, load, redacted


@pytest.fixture(autouse=True)
def nothing_around(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No settings file of the person who runs the tests gets in."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_without_anything_every_setting_is_its_default() -> None:
    settings = load(environ={})
    assert settings == Settings()
    assert set(settings.origins().values()) == {"default"}


def test_command_line_beats_environment_beats_file_beats_default(tmp_path: Path) -> None:
    write(tmp_path / "pilotfish.toml", "draft_tokens = 1\nwindow = 2\nmax_tokens = 3\n")
    environ = {"PILOTFISH_DRAFT_TOKENS": "4", "PILOTFISH_WINDOW": "5"}
    settings = load({"draft_tokens": 6, "window": None}, environ=environ)
    assert (settings.draft_tokens, settings.window, settings.max_tokens, settings.resends) == (6, 5, 3, 2)
    origins = settings.origins()
    assert origins["draft_tokens"] == "cli"
    assert origins["window"] == "env PILOTFISH_WINDOW"
    assert origins["max_tokens"] == "file pilotfish.toml"
    assert origins["resends"] == "default"


def test_the_file_here_beats_the_users_own(tmp_path: Path) -> None:
    environ = {"XDG_CONFIG_HOME": str(tmp_path / "config")}
    own = write(tmp_path / "config/pilotfish/config.toml", "window = 3\n")
    assert load(environ=environ).origins()["window"] == f"file {own}"
    write(tmp_path / "pilotfish.toml", "window = 2\n")
    assert load(environ=environ).window == 2


def test_a_named_file_beats_both_and_config_beats_its_variable(tmp_path: Path) -> None:
    write(tmp_path / "pilotfish.toml", "window = 2\n")
    named = write(tmp_path / "named.toml", "window = 7\n")
    other = write(tmp_path / "other.toml", "window = 8\n")
    assert load(environ={"PILOTFISH_CONFIG": str(named)}).window == 7
    assert load(config=other, environ={"PILOTFISH_CONFIG": str(named)}).window == 8


def test_a_named_file_that_is_missing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="there is no settings file .*nowhere.toml: create it, or drop --config"):
        load(config=tmp_path / "nowhere.toml", environ={})


@pytest.mark.parametrize("text", ["window = ", "window 3", "\x00"])
def test_a_file_that_is_not_toml_is_an_error_with_its_path(tmp_path: Path, text: str) -> None:
    path = write(tmp_path / "pilotfish.toml", text)
    with pytest.raises(SettingsError, match=f"{path.name} cannot be read: .*"):
        load(environ={})


def test_a_file_that_is_not_text_is_an_error_too(tmp_path: Path) -> None:
    (tmp_path / "pilotfish.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(SettingsError, match="cannot be read"):
        load(environ={})


def test_redis_url_is_understood_and_the_prefixed_name_wins() -> None:
    assert load(environ={"REDIS_URL": "redis://a"}).origins()["redis_url"] == "env REDIS_URL"
    both = load(environ={"PILOTFISH_REDIS_URL": "redis://b", "REDIS_URL": "redis://a"})
    assert (both.redis_url, both.origins()["redis_url"]) == ("redis://b", "env PILOTFISH_REDIS_URL")


def test_an_empty_variable_counts_as_unset() -> None:
    assert load(environ={"PILOTFISH_SEED": "", "REDIS_URL": ""}) == Settings()


def test_foreign_variables_are_none_of_our_business() -> None:
    assert load(environ={"PATH": "/bin", "PILOT": "1", "pilotfish_window": "9"}) == Settings()


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("draft_token", "draft_tokens"), ("redis", "redis_url"), ("topk", "top_k"), ("max-tokens", "max_tokens")],
)
def test_an_unknown_name_is_refused_with_the_nearest(tmp_path: Path, name: str, nearest: str) -> None:
    with pytest.raises(SettingsError, match=f"the command line names an unknown setting, '{name}': .*'{nearest}'"):
        load({name: 1}, environ={})
    with pytest.raises(SettingsError, match=f"the environment .PILOTFISH_.* unknown .*'{nearest}'"):
        load(environ={f"PILOTFISH_{name.upper()}": "1"})
    write(tmp_path / "pilotfish.toml", f"{name} = 1\n")
    with pytest.raises(SettingsError, match=f"pilotfish.toml names an unknown setting, '{name}': .*'{nearest}'"):
        load(environ={})


def test_a_table_in_the_file_is_an_unknown_name(tmp_path: Path) -> None:
    write(tmp_path / "pilotfish.toml", "[window]\nsize = 3\n")
    with pytest.raises(SettingsError, match="window = .* an integer from 1 to 16"):
        load(environ={})


@pytest.mark.parametrize(
    ("name", "value", "takes"),
    [
        ("draft_tokens", "many", "an integer from 0 to 256"),
        ("draft_tokens", "257", "an integer from 0 to 256"),
        ("window", "1.5", "an integer from 1 to 16"),
        ("temperature", "nan", "a number from 0 to 100"),
        ("top_p", "0", "a number above 0 to 1"),
        ("mode", "gatd", "exact, gated, cloud_only or edge_only"),
        ("on_cloud_loss", "panic", "wait or local"),
        ("routing", "random", "prefix, load or off"),
        ("tenant", "a b", "a text that matches .*"),
        ("redis_url", "http://x", "a URL that starts with redis://, rediss:// or unix://"),
    ],
)
def test_a_bad_value_names_setting_value_origin_and_what_is_allowed(name: str, value: str, takes: str) -> None:
    variable = f"PILOTFISH_{name.upper()}"
    sentence = f"{name} = '{value}' \\(from env {variable}\\) is not possible: it takes {takes}"
    with pytest.raises(SettingsError, match=sentence) as caught:
        load(environ={variable: value})
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__
    assert "pydantic" not in str(caught.value)


def test_no_password_is_shown_or_told() -> None:
    settings = load({"redis_url": "redis://user:secret@host:6379/0"}, environ={})
    assert settings.shown()["redis_url"] == "redis://user:***@host:6379/0"
    assert redacted("redis://host/0") == "redis://host/0"
    with pytest.raises(SettingsError) as caught:
        load({"redis_url": "http://user:secret@host"}, environ={})
    assert "secret" not in str(caught.value)
    with pytest.raises(SettingsError, match="redis_url = .* is not possible") as caught:
        load({"redis_url": "redis://user:secret[@host"}, environ={})
    assert "secret" not in str(caught.value)


def test_what_is_shown_is_every_setting_in_words() -> None:
    shown = Settings().shown()
    assert list(shown) == list(Settings.model_fields)
    assert (shown["seed"], shown["window"]) == ("unset", "8")


def test_a_home_directory_is_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    assert load({"draft_model": "~/draft.gguf"}, environ={}).draft_model == "/home/someone/draft.gguf"


def test_settings_cannot_be_changed_afterwards() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Settings().window = 2  # type: ignore[misc]


@pytest.mark.parametrize("name", Settings.model_fields)
def test_every_setting_says_what_it_is_for_and_what_it_takes(name: str) -> None:
    assert Settings.model_fields[name].description
    assert allowed(name)


def test_the_defaults_are_those_of_the_messages() -> None:
    settings, sampling, prompt = Settings(), Sampling(), Prompt(request="0" * 32, text="x")
    shared = ("temperature", "top_k", "top_p", "min_p")
    assert [getattr(settings, name) for name in shared] == [getattr(sampling, name) for name in shared]
    same = ("mode", "on_cloud_loss", "max_tokens", "deadline_ms")
    assert [getattr(settings, name) for name in same] == [getattr(prompt, name) for name in same]


@given(st.dictionaries(st.text(max_size=20), st.one_of(st.text(), st.integers(), st.floats(), st.lists(st.integers()))))
def test_whatever_is_given_is_settings_or_a_settings_error(cli: dict[str, object]) -> None:
    named = dict(zip(Settings.model_fields, cli.values(), strict=False))
    for given_here in (cli, named):
        try:
            load(given_here, environ={})
        except SettingsError as error:
            assert str(error)


@pytest.mark.parametrize("name", ["cache_dir", "draft_model"])
def test_the_home_of_nobody_is_refused_with_where_it_came_from(name: str) -> None:
    with pytest.raises(SettingsError, match=rf"{name} = '~nosuchuser/x' \(from cli\) .* no home directory"):
        load({name: "~nosuchuser/x"}, environ={})
    with pytest.raises(SettingsError, match="no home directory '~nosuchuser'"):
        load(config="~nosuchuser/x", environ={})


def test_who_has_no_home_has_no_settings_file_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.path.expanduser", lambda path: path)
    assert load(environ={}) == Settings()


def test_a_suggestion_holds_where_nobody_chose() -> None:
    chosen = load({"window": 3}, environ={})
    suggested = chosen.suggest(window=1, drafting="always")
    assert (suggested.window, suggested.drafting) == (3, "always")
    assert (suggested.origins()["drafting"], chosen.origins()["drafting"]) == ("cli", "default")
