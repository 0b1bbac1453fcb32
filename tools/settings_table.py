"""The table of docs/settings.md from `protocol/settings.py`; a test fails when it is stale.

python tools/settings_table.py            # writes the table between the page's two marks anew
"""

from __future__ import annotations

from pathlib import Path

from pilotfish.protocol.settings import Settings, allowed

PAGE = Path(__file__).parent.parent / "docs" / "settings.md"
BEGIN, END = "<!-- written by tools/settings_table.py -->", "<!-- end of the table -->"


def table() -> str:
    """One row for each setting: name, what it takes, its default, what it is."""
    shown = Settings().shown()
    rows = [
        f"| `{name}` | {allowed(name).replace('|', chr(92) + '|')} | {_default(shown[name])} | {field.description} |"
        for name, field in Settings.model_fields.items()
    ]
    return "\n".join(["| setting | takes | default | what |", "|---|---|---|---|", *rows])


def _default(shown: str) -> str:
    return {"": "none", "True": "true", "False": "false"}.get(shown, shown)


def renewed(page: str) -> str:
    """The page with its table written anew."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{table()}\n\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(renewed(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
