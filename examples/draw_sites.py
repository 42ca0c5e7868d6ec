"""Draw what `lnq.find_sites` finds in a small transformer.

    python examples/draw_sites.py docs/sites.svg

Top: each site as a row, its leaf on the left and the value that it reads on the right. Bottom:
what is listed and not quantized.
"""

import sys
from html import escape
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

import lnq
from lnq.sites import Site, Sites

WIDTH, TOP, ROW, BOX = 860, 44, 46, 34
LEAF, SITE, DATA = (10, 250), (320, 290), (700, 150)
"""Left edge and width of the three columns."""


class Transformer(nn.Module):
    """One block between an embedding and the same embedding, transposed."""

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        embed = nn.Embed(50, 16, name="embed")
        x = embed(tokens)
        attention = nn.MultiHeadDotProductAttention(2, use_bias=False, name="attention")
        x = x + attention(nn.LayerNorm(name="norm1")(x))
        hidden = nn.relu(nn.Dense(32, name="up")(nn.LayerNorm(name="norm2")(x)))
        x = x + nn.Dense(16, name="down")(hidden)
        return embed.attend(x)


class Style(NamedTuple):
    """Fill and line of a box."""

    fill: str
    line: str


BLUE, GREEN = Style("#dbe9f8", "#2f6db3"), Style("#e1f2e3", "#3f8f4f")
ORANGE, GRAY = Style("#fdebd3", "#c77f1b"), Style("#f2f2f2", "#8c8c8c")


def text(x: float, y: float, line: str, size: int = 12, more: str = "") -> str:
    return f'<text x="{x}" y="{y}" font-size="{size}" {more}>{line}</text>'


def box(x: float, y: float, width: float, style: Style, lines: list[str], radius: int = 4) -> str:
    height = BOX if len(lines) == 2 else BOX - 10
    rect = (
        f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="{radius}" '
        f'fill="{style.fill}" stroke="{style.line}"/>'
    )
    written = [text(x + 8, y + 15 + 14 * i, line, 12 - i) for i, line in enumerate(lines)]
    return "\n".join([rect, *written])


def line(start: tuple[float, float], end: tuple[float, float], style: Style) -> str:
    (x1, y1), (x2, y2) = start, end
    middle = (x1 + x2) / 2
    curve = f"M{x1} {y1}C{middle} {y1} {middle} {y2} {x2} {y2}"
    return f'<path d="{curve}" fill="none" stroke="{style.line}" stroke-width="1.5"/>'


def short(path: str) -> str:
    return escape(path.removeprefix("params/"))


def shape_of(site: Site) -> str:
    """The leaf's shape, the axes that are summed over in bold."""
    axes = [
        f'<tspan font-weight="bold" fill="#b3261e">{n}</tspan>' if i in site.contracting else str(n)
        for i, n in enumerate(site.shape)
    ]
    return f"({', '.join(axes)})"


def follows(site: Site) -> str:
    parts = [f"+ {short(site.bias)}"] if site.bias else []
    return ", ".join([*parts, *map(escape, site.chain)])


def draw(found: Sites) -> str:
    """The picture as SVG."""
    parts = [
        text(x, 26, title, 13, 'font-weight="bold"')
        for (x, _), title in zip(
            (LEAF, SITE, DATA), ("leaf", "site, and what follows it", "value read"), strict=True
        )
    ]
    leaves, values = {}, {}
    for row, site in enumerate(found.sites):
        leaves.setdefault(site.path, (site, []))[1].append(row)
        values.setdefault(site.input, (site, []))[1].append(row)

    def place(rows: list[int]) -> float:
        return TOP + ROW * sum(rows) / len(rows)

    for row, site in enumerate(found.sites):
        y = TOP + ROW * row
        second = " ".join(filter(None, [f"gives {site.out.shape}", follows(site)]))
        parts.append(box(SITE[0], y, SITE[1], BLUE, [f"{site.primitive}", second]))
    for path, (site, rows) in leaves.items():
        y = place(rows)
        parts.append(box(LEAF[0], y, LEAF[1], GREEN, [short(path), shape_of(site)]))
        ends = [(SITE[0], TOP + ROW * row + BOX / 2) for row in rows]
        parts += [line((sum(LEAF), y + BOX / 2), end, GREEN) for end in ends]
    for number, (site, rows) in values.items():
        y = place(rows)
        lines = [f"input {number}", str(site.act.shape)]
        parts.append(box(DATA[0], y, DATA[1], ORANGE, lines, BOX // 2))
        ends = [(sum(SITE), TOP + ROW * row + BOX / 2) for row in rows]
        parts += [line((DATA[0], y + BOX / 2), end, ORANGE) for end in ends]

    y = TOP + ROW * len(found.sites) + 26
    parts.append(text(LEAF[0], y, "listed, not quantized", 13, 'font-weight="bold"'))
    step = (WIDTH - 10) / 2
    for i, use in enumerate(found.others):
        words = f"{short(use.path) or 'data and data'}: {escape(use.reason)}"
        x, down = LEAF[0] + step * (i % 2), y + 12 + 30 * (i // 2)
        parts.append(box(x, down, step - 10, GRAY, [words]))
    height = y + 12 + 30 * ((len(found.others) + 1) // 2) + 6
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
        f'width="{WIDTH}" height="{height}" font-family="Helvetica, Arial, sans-serif">'
        f'\n<rect width="{WIDTH}" height="{height}" fill="white"/>'
    )
    return "\n".join([head, *parts, "</svg>\n"])


def main() -> None:
    """Write the picture to the file that is named."""
    model, tokens = Transformer(), jnp.zeros((2, 6), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), tokens)
    found = lnq.find_sites(model.apply, params, tokens)
    Path(sys.argv[1]).write_text(draw(found))


if __name__ == "__main__":
    main()
