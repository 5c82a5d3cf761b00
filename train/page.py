"""A page of headings, paragraphs, tables and images, as Markdown and as HTML."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from dataclasses import dataclass

STYLE = """body{font:15px/1.5 sans-serif;max-width:75rem;margin:2rem auto;padding:0 1rem}table{border-collapse:collapse}
th,td{padding:.2rem .7rem;text-align:left;border-bottom:1px solid #ccc}img{max-width:100%}code{background:#f2f2f2}"""


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
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Image:
    """name: of the file, which lies beside the page."""

    name: str
    caption: str


@dataclass(frozen=True)
class Prose:
    """Markdown that someone wrote: paragraphs, lists of lines that begin with "- ", `code` and **bold**; no more."""

    text: str


Block = Heading | Text | Grid | Image | Prose


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
    if isinstance(block, Image):
        return f"![{block.caption}]({block.name})\n\n{block.caption}"
    lines = [block.head, ["---"] * len(block.head), *block.rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def to_html(blocks: Sequence[Block]) -> str:
    """The page as one HTML file, but for its images."""
    body = "\n".join(_html(block) for block in blocks)
    title = next(block.text for block in blocks if isinstance(block, Heading))
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{STYLE}</style></head><body>\n{body}\n</body></html>\n"
    )


def _html(block: Block) -> str:
    if isinstance(block, Heading):
        return f"<h{block.level}>{_inline(block.text)}</h{block.level}>"
    if isinstance(block, Text):
        return f"<p>{_inline(block.text)}</p>"
    if isinstance(block, Prose):
        return "\n".join(_prose(part) for part in re.split(r"\n\s*\n", block.text.strip()))
    if isinstance(block, Image):
        name, caption = html.escape(block.name), html.escape(block.caption)
        return f'<figure><img src="{name}" alt="{caption}"><figcaption>{caption}</figcaption></figure>'
    head = "".join(f"<th>{_inline(cell)}</th>" for cell in block.head)
    rows = "\n".join(f"<tr>{''.join(f'<td>{_inline(cell)}</td>' for cell in row)}</tr>" for row in block.rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>\n{rows}\n</tbody></table>"


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
