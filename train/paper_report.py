"""The paper's tables beside ours: lines for the terminal, and a report as Markdown and HTML.

Everything in it is computed from results files of train.experiments; only figures need data or runs at hand.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from flow.page import Block, Grid, Heading, Image, Prose, Text, plural, to_html, to_markdown
from flow.shard import write_bytes
from loaders.index import open_index
from train.figures import draw_confusion, draw_filters, draw_flow, draw_recall, draw_stacking
from train.fuse import source_group
from train.measure import Measure, compare, measure, newest, paper_difference, reading, splits_of
from train.plan import MINI_CHANGES, MINI_LIMIT_S, Fused, Run, Setting, folder, locate, run_config
from train.record import Book, Entry
from train.tables import TABLES, UCF_SVM, Cell, Table, describe_source

logger = logging.getLogger(__name__)

UNKNOWN = "–"


# --- what it says ------------------------------------------------------------------------------------------------


def list_rows(books: Sequence[Book]) -> str:
    """Every row of every table: what stands behind it, the paper's value, and ours at each scale."""
    rows = []
    for table in TABLES:
        for cell in table.cells:
            ours = [text for book in books if (text := _short(book, table, cell))]
            source = "published" if cell.source is None else describe_source(cell.source)
            rows.append(
                [table.name, cell.row, cell.column, source, f"{cell.paper_pct:.1f}", "; ".join(ours) or UNKNOWN]
            )
    head = ["table", "row", "column", "config", "paper %", "ours %"]
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    lines = ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)) for row in [head, *rows]]
    return "\n".join(line.rstrip() for line in lines)


def _short(book: Book, table: Table, cell: Cell) -> str:
    value = None if cell.source is None else measure(book, cell.source, table.metric, splits_of(book, table))
    if value is None:
        return ""
    interval = f" +- {(value.high - value.low) / 2:.1f}" if value.num_sources > 1 else ""
    return f"{value.pct:.1f}{interval} ({plural(value.num_runs, 'run')}, {book.scale})"


def report_blocks(books: Sequence[Book], findings: str, images: Sequence[Image]) -> list[Block]:
    """The whole report. findings: prose, what the tables show in someone's eyes; may be empty."""
    blocks: list[Block] = [
        Heading("The paper's experiments, and ours", 1),
        Text(
            "Every number of tables 1a to 4 of Simonyan & Zisserman, Two-Stream Convolutional Networks for Action "
            "Recognition in Videos (NIPS 2014), beside what this code reached. Made by "
            "`python -m train.experiments report`; `run NAME` fills what is missing."
        ),
    ]
    blocks += [block for book in books for block in _setting_blocks(book)]
    blocks.append(
        Text(
            "Numbers are means over splits and seeds, in percent. Intervals, 95 %, are bootstrapped over the sources "
            "of the test videos and over seeds; with one seed they tell of the choice of test videos alone, and an "
            "order is claimed from three seeds on. Of twenty intervals one misses by chance."
        )
    )
    for table in TABLES:
        blocks += _table_blocks(table, books)
    if findings.strip():
        blocks += [Heading("Findings"), Prose(findings)]
    if images:
        blocks += [Heading("Figures"), *images]
    return blocks


def _setting_blocks(book: Book) -> list[Block]:
    """What data, nets and machines the results of a scale come from."""
    entries = newest(book)
    trained = [entry for entry in entries if entry.steps]
    if not trained:
        return []
    titles = {"full": "the paper's own setting", "mini": "small sets, small nets, short schedules"}
    values = [book.configs[entry.digest] for entry in trained]
    machines = {_machine(book.made_on[entry.made_on]["machine"], entry.gpus) for entry in trained}
    text = (
        f"Nets of width {_each(c['model.width'] for c in values)}, crops of "
        f"{_each(c['data.crop_px'] for c in values)} px, batches of "
        f"{_each(c['train.batch_size'] for c in values)}, {_each(entry.steps for entry in trained)} steps. "
        f"{plural(len(entries), 'result')} on {'; '.join(sorted(machines))}{_times(book, trained)}."
    )
    blocks: list[Block] = [Heading(f"Scale `{book.scale}`: {titles[book.scale]}"), Text(text)]
    if book.scale == "mini":
        blocks.append(Grid(["of the paper's setting", "at mini scale"], MINI_CHANGES))
    return [*blocks, _data_grid(book, entries)]


def _each(values: Any) -> str:
    return ", ".join(f"{value:,g}" for value in sorted(set(values)))


def _machine(machine: dict[str, Any], gpus: int) -> str:
    used = f", {gpus} x {machine['gpus'][0]}" if gpus else ""
    return f"{plural(machine['cores'], 'core')} of {machine['cpu']}{used}"


def _times(book: Book, trained: Sequence[Entry]) -> str:
    """How long runs took, of those that were not stopped in between, and how many took longer than is meant."""
    seconds = [entry.seconds for entry in trained if not entry.resumed]
    if not seconds:
        return ""
    text = f"; a run took {median(seconds):.0f} s in the median, {max(seconds):.0f} s at most"
    if book.scale == "mini":
        num_longer = sum(value > MINI_LIMIT_S for value in seconds)
        text += f"; {num_longer:,} of {plural(len(seconds), 'run')} took more than {MINI_LIMIT_S} s"
    return text


def _data_grid(book: Book, entries: Sequence[Entry]) -> Grid:
    rows = []
    lists = [book.lists[key] for key in {entry.test_list for entry in entries if entry.test_list}]
    for content in sorted(lists, key=lambda content: (content["data"], content["split_list"])):
        ids, num_classes = content["video_ids"], content["num_classes"]
        sources = len({source_group(video_id) for video_id in ids})
        rows.append([content["data"], content["split_list"], str(num_classes), f"{len(ids):,}", f"{sources:,}",
                     f"{100 / num_classes:.1f} %"])  # fmt: skip
    return Grid(["data", "test list", "classes", "videos", "sources", "chance"], rows)


def _table_blocks(table: Table, books: Sequence[Book]) -> list[Block]:
    """A table, and the differences that it isolates as far as both sides were run."""
    blocks: list[Block] = [Heading(table.title)]
    head = ["row", "column", "config", "paper", *(f"ours, {book.scale}" for book in books)]
    rows = []
    for cell in table.cells:
        ours = [
            _long(measure(book, cell.source, table.metric, splits_of(book, table)) if cell.source else None)
            for book in books
        ]
        source = "published" if cell.source is None else f"`{describe_source(cell.source)}`"
        rows.append([cell.row, cell.column, source, f"{cell.paper_pct:.1f}", *ours])
    blocks.append(Grid(head, rows))
    for book in books:
        rows = []
        for comparison in table.comparisons:
            if found := compare(book, comparison, splits_of(book, table)):
                paper = f"{paper_difference(table, comparison):+.1f}"
                points = f"{found.pct:+.1f} ({_interval(found, '+.1f')}), {plural(found.num_runs, 'pair')}"
                rows.append([comparison.what, paper, points, reading(found)])
        if rows:
            blocks.append(Text(f"Paired differences in points, scale `{book.scale}`:"))
            blocks.append(Grid(["difference", "paper", f"ours, {book.scale}", "order"], rows))
    return blocks


def _long(value: Measure | None) -> str:
    if value is None:
        return UNKNOWN
    splits = f"split{'s' * (len(value.splits) != 1)} {', '.join(map(str, value.splits))}"
    return f"{value.pct:.1f} ({_interval(value, '.1f')}), {plural(value.num_runs, 'run')} on {splits}"


def _interval(value: Measure, digits: str) -> str:
    if value.num_sources == 1:
        return "all test videos from one source, no interval"
    return f"{value.low:{digits}} to {value.high:{digits}}"


# --- figures -----------------------------------------------------------------------------------------------------

CAPTIONS = {
    "fig2.png": "Fig. 2: two frames, the flow between them, its components, and their colour coding.",
    "fig3.png": "Fig. 3: what a stack holds of a point, at its place (left) or along its trajectory (right).",
    "fig4.png": "Fig. 4: filters of the temporal net's first layer: a column a filter, a row an input channel.",
    "fig5.png": "Fig. 5: confusion matrix of the two-stream model of Table 3's last row, split 1.",
    "fig6.png": "Fig. 6: per-class recall of the same model.",
}


def draw_figures(setting: Setting, out: Path, clip: tuple[Path, str] | None = None) -> None:
    """Draw the figures whose data or runs, of split 1 and seed 0, are at hand; the others stay as they are.

    clip: packed set and video id of figures 2 and 3; None: the first test video of the runs' own set, if at hand.
    """
    packed = locate(run_config("flow_L10", setting).data.root, setting)
    if clip is None and (packed / "dataset.json").exists():
        index = open_index(packed)
        clip = packed, index.video_ids(index.split("split1_test")[:1])[0]
    run = folder(Run("flow_L10", 1, 0), setting)
    fused = folder(Fused(UCF_SVM, 1, 0), setting) / "results.json"
    if clip is not None:
        _draw("fig2.png", out, lambda path: draw_flow(*clip, path))
        _draw("fig3.png", out, lambda path: draw_stacking(*clip, path))
    if run.exists():
        _draw("fig4.png", out, lambda path: draw_filters(run, path))
    if fused.exists():
        _draw("fig5.png", out, lambda path: draw_confusion(fused, path, method=UCF_SVM.method))
        _draw("fig6.png", out, lambda path: draw_recall(fused, path, method=UCF_SVM.method))


def _draw(name: str, out: Path, draw: Callable[[Path], Any]) -> None:
    try:
        draw(out / name)
    except (ValueError, OSError, ImportError) as error:  # a run in work, say, or no matplotlib
        logger.warning("%s is not drawn: %s", name, error)


# --- the files ---------------------------------------------------------------------------------------------------


def write_report(
    books: Sequence[Book], setting: Setting, out: Path, findings: Path, clip: tuple[Path, str] | None = None
) -> list[Path]:
    """Write report.md and report.html, with the figures beside them. Returns their paths.

    findings: file of prose that goes into it as it is (see `flow.page.Prose`), if it is there. clip: as in
    `draw_figures`.
    """
    out.mkdir(parents=True, exist_ok=True)
    draw_figures(setting, out, clip)
    images = [Image(name, caption) for name, caption in CAPTIONS.items() if (out / name).exists()]
    blocks = report_blocks(books, findings.read_text("utf-8") if findings.exists() else "", images)
    pages = {out / "report.md": to_markdown(blocks), out / "report.html": to_html(blocks)}
    for path, page in pages.items():
        write_bytes(path, page.encode())
    return list(pages)
