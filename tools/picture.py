"""docs/images/round-light.svg and round-dark.svg, the README's picture: one round, in both of GitHub's colours.

python tools/picture.py
"""

from __future__ import annotations

from pathlib import Path

IMAGES = Path(__file__).parent.parent / "docs" / "images"
SANS, MONO = "system-ui, -apple-system, 'Segoe UI', sans-serif", "ui-monospace, SFMono-Regular, Menlo, monospace"
LIGHT = {
    "text": "#1f2328", "dim": "#59636e", "line": "#d1d9e0", "card": "#f6f8fa", "chip": "#ffffff",
    "ours": "#0969da", "right": "#1a7f37", "wrong": "#bc4c00",
}  # fmt: skip
DARK = {
    "text": "#f0f6fc", "dim": "#9198a1", "line": "#3d444d", "card": "#151b23", "chip": "#0d1117",
    "ours": "#4493f8", "right": "#3fb950", "wrong": "#db6d28",
}  # fmt: skip
FORMULA = "token(pos) = argmax  filter(logits / T)[id] + gumbel(seed, pos, id)"
Palette = dict[str, str]


def text(x: float, y: float, words: str, colour: str, size: int = 14, *, mono: bool = False, bold: bool = False) -> str:
    """Words centred at x, on the line y."""
    family, weight = (MONO if mono else SANS), ("600" if bold else "400")
    return (
        f'<text x="{x}" y="{y}" fill="{colour}" font-family="{family}" font-size="{size}" font-weight="{weight}" '
        f'text-anchor="middle">{words}</text>'
    )


def card(x: int, width: int, title: str, below: str, of: Palette) -> str:
    """One of the three places."""
    box = f'<rect x="{x}" y="16" width="{width}" height="216" rx="10" fill="{of["card"]}" stroke="{of["line"]}"/>'
    middle = x + width / 2
    return box + text(middle, 48, title, of["text"], 17, bold=True) + text(middle, 70, below, of["dim"], 13)


def chips(x: int, y: int, tokens: str, colours: list[str], of: Palette) -> str:
    """Tokens side by side, each with the colour of what became of it."""
    drawn = ""
    for index, (token, colour) in enumerate(zip(tokens, colours, strict=True)):
        at = x + 40 * index
        look = f'rx="6" fill="{of["chip"]}" stroke="{colour}" stroke-width="2"'
        drawn += f'<rect x="{at}" y="{y}" width="32" height="32" {look}/>'
        drawn += text(at + 16, y + 22, token, colour, 16, mono=True, bold=True)
    return drawn


def arrow(x: int, y: int, length: int, colour: str) -> str:
    """Along x; to the left if the length is negative."""
    tip, back = x + length, -8 if length > 0 else 8
    head = f"M{tip + back} {y - 5} L{tip} {y} L{tip + back} {y + 5}"
    return f'<path d="M{x} {y} H{tip} {head}" fill="none" stroke="{colour}" stroke-width="2" stroke-linecap="round"/>'


def picture(of: Palette) -> str:
    """The whole picture."""
    ours, right, wrong, dim = of["ours"], of["right"], of["wrong"], of["dim"]
    parts = [
        card(10, 260, "device", "llama.cpp, the small model", of),
        card(400, 160, "Redis", "streams", of),
        card(690, 260, "cloud", "vLLM, the large model", of),
        text(140, 106, "drafts K tokens", of["text"]),
        chips(64, 118, "=477", [ours] * 4, of),
        text(140, 190, "commits what is right", of["text"]),
        text(140, 212, "= 4 6, then drafts on", dim, 13, mono=True),
        arrow(280, 124, 110, ours),
        arrow(570, 124, 110, ours),
        text(480, 110, "job", of["text"], 14, bold=True),
        text(480, 129, "ids and draft", dim, 13),
        arrow(680, 186, -110, right),
        arrow(390, 186, -110, right),
        text(480, 182, "verdict", of["text"], 14, bold=True),
        text(480, 201, "accepted + 1 ids", dim, 13),
        text(820, 106, "one pass, K + 1 coupled draws", of["text"]),
        chips(764, 118, "=46", [right, right, wrong], of),
        text(820, 190, "its own token at each place", of["text"]),
        text(820, 212, "a draft is right iff equal", dim, 13),
        text(
            480, 266, "token(pos) = argmax  filter(logits / T)[id] + gumbel(seed, pos, id)", of["text"], 15, mono=True
        ),
        text(480, 290, "the same draw on both sides: the noise is a hash, so both know it", dim, 13),
    ]
    label = "One round: the device drafts, Redis carries ids, the cloud answers with its own draws"
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 960 304" role="img" aria-label="{label}">'
    return "\n".join([head, *parts, "</svg>"]) + "\n"


if __name__ == "__main__":
    for name, palette in (("light", LIGHT), ("dark", DARK)):
        (IMAGES / f"round-{name}.svg").write_text(picture(palette), encoding="utf-8")
