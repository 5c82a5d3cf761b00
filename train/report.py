"""A run on one page: `python -m train.report RUN [RUN ...]` writes RUN/report.html, which needs no other file.

What is not there yet, or damaged, is left out with a sentence that says why: a report never fails the run that it
reports on.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from tqdm import tqdm

from flow.command import Parser, describe_error
from flow.page import Block, Heading, Text, to_html
from flow.shard import write_bytes
from train.config import read_config
from train.report_parts import LEAD, SECTIONS, guarded, sentence

logger = logging.getLogger(__name__)

NAME = "report.html"


def write_report(run: Path) -> Path:
    """Write the run's report.html, of what is there. Returns its path. Raises OSError if it cannot be written."""
    write_bytes(run / NAME, to_html(report_blocks(run)).encode("utf-8", "backslashreplace"))
    return run / NAME


def leave_report(run: Path) -> list[Path]:
    """`write_report` at the end of a command that has done its work: what hinders it is logged. Returns its path."""
    try:
        return [write_report(run)]
    except Exception as error:  # whatever it is, it is no reason to fail
        logger.warning("%s is not written: %s", run / NAME, error)
        return []


def report_blocks(run: Path) -> list[Block]:
    """The whole page."""
    lead = [said for part in LEAD if (said := sentence(part, run))]
    blocks: list[Block] = [Heading(run.resolve().name, 1), Text(" ".join(lead) or "Nothing is known of this run.")]
    for title, section in tqdm(SECTIONS.items(), desc="report", unit="section", delay=1, leave=False, disable=None):
        blocks.append(Heading(title))
        blocks += guarded(section, run)
    return blocks


def main(arguments: list[str] | None = None) -> None:
    """Command line: write the report of each run."""
    parser = Parser(
        prog="python -m train.report",
        description="Write a run's report.html, of what is there already: also while it trains, and for older runs.",
        epilog="example:\n  python -m train.report runs/ucf101\n\n"
        "exit code: 0 written; 1 failed, the last line says why",
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run folder of train.launch")
    options = parser.parse_args(arguments)
    try:
        for run in options.runs:
            if not (run / "config.yaml").exists():
                read_config(run / "config.yaml")  # tells which run may be meant; a damaged one has a report
            print(f"wrote {write_report(run)}")
    except (ValueError, OSError) as error:
        sys.exit(f"error: {describe_error(error)}")


if __name__ == "__main__":
    main()
