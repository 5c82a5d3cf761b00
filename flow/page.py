"""A page of headings, paragraphs, tables and images, as Markdown and as HTML, for screens from a phone's width on."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Sequence
from dataclasses import dataclass

STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:75rem;margin:2rem auto;padding:0 1rem;color:#1a1a1a}
h1,h2,h3{line-height:1.25;overflow-wrap:anywhere}h1{font-size:1.7em}h2{font-size:1.25em;margin:2.2rem 0 .6rem;
padding-top:.7rem;border-top:1px solid #ddd}h3{font-size:1em;margin:1.4rem 0 .4rem}p,li{overflow-wrap:anywhere}
p,ul{max-width:48rem}.table,.wide{overflow-x:auto}table{border-collapse:collapse;font-variant-numeric:tabular-nums}
th,td{padding:.2rem 1.4rem .2rem 0;text-align:left;vertical-align:top;border-bottom:1px solid #ddd}
img{max-width:100%;height:auto}figure{margin:.5rem 0}figcaption{font-size:.87em;color:#444;overflow-wrap:anywhere}
code,pre{background:#f4f4f4}pre{padding:.7rem;overflow-x:auto;font-size:.87em}summary{cursor:pointer}
.columns{display:grid;gap:.5rem 1.5rem;grid-template-columns:repeat(auto-fill,minmax(min(100%,var(--least)),1fr))}
.columns>div{min-width:0}@media(max-width:600px){body{margin:1rem auto}th,td{padding-right:.6rem;font-size:.93em}}"""


@dataclass(frozen=True)
class Heading:
    text: str
    level: int = 2


@dataclass(frozen=True)
class Text:
    """A paragraph; `code` stands between backticks, here and in tables."""

    text: str


@dataclass(frozen=True)
class Grid:
    """A table; where all of its head is empty, HTML has none."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Image:
    """name: of the file, which lies beside the page."""

    name: str
    caption: str


@dataclass(frozen=True)
class Picture:
    """An image that is part of the page itself.

    mime: such as "image/svg+xml" or "image/jpeg". least_px: it is drawn no narrower, and moves sideways where the
    screen is; 0: as narrow as the screen.
    """

    content: bytes
    mime: str
    caption: str
    least_px: int = 0

    @property
    def uri(self) -> str:
        return f"data:{self.mime};base64,{base64.b64encode(self.content).decode()}"


@dataclass(frozen=True)
class Columns:
    """Blocks beside one another, as many as there is room for; each gets least_px at least, if the screen has them."""

    blocks: Sequence[Block]
    least_px: int = 300


@dataclass(frozen=True)
class Code:
    """Lines as they stand."""

    text: str


@dataclass(frozen=True)
class Details:
    """Blocks that are shown when the reader asks for them."""

    summary: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Prose:
    """Markdown that someone wrote: paragraphs, lists of lines that begin with "- ", `code` and **bold**; no more."""

    text: str


Block = Heading | Text | Grid | Image | Picture | Columns | Code | Details | Prose


def to_markdown(blocks: Sequence[Block]) -> str:
    """The page as GitHub's Markdown."""
    return "\n\n".join(_markdown(block) for block in blocks) + "\n"


def _markdown(block: Block) -> str:
    if isinstance(block, Heading):
        return f"{'#' * block.level} {block.text}"
    if isinstance(block, Text):
        return block.text
    if isinstance(block, Prose):
        return block.text.strip()
    if isinstance(block, Image | Picture):
        return f"![{block.caption}]({block.name if isinstance(block, Image) else block.uri})\n\n{block.caption}"
    if isinstance(block, Columns):
        return "\n\n".join(map(_markdown, block.blocks))
    if isinstance(block, Details):
        return "\n\n".join([block.summary, *map(_markdown, block.blocks)])
    if isinstance(block, Code):
        return f"```\n{block.text.rstrip()}\n```"
    lines = [block.head, ["---"] * len(block.head), *block.rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def to_html(blocks: Sequence[Block]) -> str:
    """The page as one HTML file, but for each `Image`. It needs no network."""
    body = "\n".join(_html(block) for block in blocks)
    title = next(block.text for block in blocks if isinstance(block, Heading))
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<link rel="icon" href="data:,"><title>{html.escape(title)}</title>'
        f"<style>{STYLE}</style></head><body>\n{body}\n</body></html>\n"
    )


def _html(block: Block) -> str:
    if isinstance(block, Heading):
        return f"<h{block.level}>{_inline(block.text)}</h{block.level}>"
    if isinstance(block, Text):
        return f"<p>{_inline(block.text)}</p>"
    if isinstance(block, Prose):
        return "\n".join(_prose(part) for part in re.split(r"\n\s*\n", block.text.strip()))
    if isinstance(block, Image | Picture):
        name, caption = html.escape(block.name if isinstance(block, Image) else block.uri), html.escape(block.caption)
        image = f'<img src="{name}" alt="{caption}">'
        if isinstance(block, Picture) and block.least_px:
            image = f'<div class="wide"><img src="{name}" alt="{caption}" style="min-width:{block.least_px}px"></div>'
        return f"<figure>{image}<figcaption>{caption}</figcaption></figure>"
    if isinstance(block, Columns):
        body = "\n".join(f"<div>{_html(part)}</div>" for part in block.blocks)
        return f'<div class="columns" style="--least:{block.least_px}px">\n{body}\n</div>'
    if isinstance(block, Details):
        body = "\n".join(map(_html, block.blocks))
        return f"<details><summary>{_inline(block.summary)}</summary>\n{body}\n</details>"
    if isinstance(block, Code):
        return f"<pre>{html.escape(block.text.rstrip())}</pre>"
    head = "".join(f"<th>{_inline(cell)}</th>" for cell in block.head)
    head = f"<thead><tr>{head}</tr></thead>" if any(block.head) else ""
    rows = "\n".join(f"<tr>{''.join(f'<td>{_inline(cell)}</td>' for cell in row)}</tr>" for row in block.rows)
    return f'<div class="table"><table>{head}<tbody>\n{rows}\n</tbody></table></div>'


def _prose(part: str) -> str:
    """What stands between two empty lines of prose, as HTML."""
    paragraph, *items = re.split(r"^- ", part, flags=re.MULTILINE)
    lines = [f"<p>{_inline(paragraph.strip())}</p>"] if paragraph.strip() else []
    lines += ["<ul>", *(f"<li>{_inline(item.strip())}</li>" for item in items), "</ul>"] if items else []
    return "\n".join(lines)


def _inline(text: str) -> str:
    """Plain text with `code` and **bold** as HTML."""
    text = re.sub(r"`([^`]*)`", r"<code>\1</code>", html.escape(text))
    return re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", text, flags=re.DOTALL)


def plural(count: int, noun: str) -> str:
    """1, "run" -> "1 run"; 2, "run" -> "2 runs"."""
    return f"{count:,} {noun}{'s' * (count != 1)}"
