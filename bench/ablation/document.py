"""A report as blocks, and what becomes of them: Markdown, or one HTML page that fetches nothing.

Text in backticks is code in both. Knows nothing of ablations.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class Block:
    """Of a kind: title, heading, text, warning, table (heads, cells), picture (a file's name, `text` describes it)."""

    kind: str
    text: str = ""
    name: str = ""
    heads: Sequence[str] = ()
    cells: Sequence[Sequence[str]] = ()


# --- Markdown ------------------------------------------------------------------------------------------------


def as_markdown(blocks: Sequence[Block]) -> str:
    """Pictures are files beside it."""
    return "\n\n".join(_markdown(block) for block in blocks) + "\n"


def _markdown(block: Block) -> str:
    if block.kind == "table":
        lines = [block.heads, ["---"] * len(block.heads), *block.cells]
        return "\n".join(f"| {' | '.join(cell.replace('|', '&#124;') for cell in line)} |" for line in lines)
    if block.kind == "picture":
        return f"![{block.text}]({block.name})"
    return {"title": "# ", "heading": "## ", "warning": "> **Note.** "}.get(block.kind, "") + block.text


# --- HTML ----------------------------------------------------------------------------------------------------

PAGE: Final = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>
:root {{ color-scheme: light dark }}
body {{ font: 16px/1.55 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem }}
h1, h2 {{ line-height: 1.2 }} h2 {{ margin-top: 2.4rem; font-size: 1.25rem }}
.wide {{ overflow-x: auto }} table {{ border-collapse: collapse; font-size: .85rem }}
th, td {{ text-align: left; padding: .3rem .8rem .3rem 0; border-bottom: 1px solid #8884; vertical-align: top }}
td {{ font-variant-numeric: tabular-nums }} td:first-child {{ white-space: nowrap }}
img {{ display: block; width: 100%; height: auto; background: #fff; border-radius: 8px }}
.warning {{ border-left: 4px solid #E69F00; padding: .4rem 1rem; background: #E69F0018 }}
code {{ font-size: .9em }}
</style></head><body>
{body}
</body></html>
"""


def as_html(blocks: Sequence[Block], pictures: Mapping[str, bytes]) -> str:
    """One file: the pictures (name -> SVG) are inside it."""
    title = next((block.text for block in blocks if block.kind == "title"), "Report")
    body = "\n".join(_html(block, pictures) for block in blocks)
    return PAGE.format(title=html.escape(title), body=body)


def _html(block: Block, pictures: Mapping[str, bytes]) -> str:
    text = _code(html.escape(block.text))
    if block.kind == "table":
        rows = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in line)}</tr>" for line in block.cells)
        heads = "".join(f"<th>{html.escape(head)}</th>" for head in block.heads)
        return f'<div class="wide"><table><tr>{heads}</tr>{rows}</table></div>'
    if block.kind == "picture":
        data = base64.b64encode(pictures[block.name]).decode()
        return f'<img alt="{html.escape(block.text)}" src="data:image/svg+xml;base64,{data}">'
    tag = {"title": "h1", "heading": "h2"}.get(block.kind, "p")
    return f"<p class=warning>{text}</p>" if block.kind == "warning" else f"<{tag}>{text}</{tag}>"


def _code(escaped: str) -> str:
    """What stands in backticks."""
    parts = escaped.split("`")
    return "".join(f"<code>{part}</code>" if place % 2 else part for place, part in enumerate(parts))
