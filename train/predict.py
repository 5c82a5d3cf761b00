"""What is in a video: `python -m train.predict RUN VIDEO [VIDEO ...]`, or in Python `Predictor` (`train.predictor`)."""

from __future__ import annotations

import argparse
import json
import logging
import math
import sys
from pathlib import Path
from typing import Any

from flow.command import Parser, describe_error, nearest_path, tidy_end
from flow.extract import FLOW_METHODS
from flow.render import check_mp4
from flow.untrusted import printable
from train.predictor import EVERY_S, FAST, FUSED, Prediction, Predictor, Timeline
from train.settings import STREAMS
from train.timeline import check_apart, draw_timeline, render_timeline, spans

__all__ = ["Predictor", "main"]

_EXAMPLES = """\
examples:
  python -m train.predict runs/ucf101 video.mp4
  python -m train.predict runs/ucf101 one.mp4 two.mp4 --fast --json
  python -m train.predict runs/ucf101 long.mp4 --timeline --every 2
  python -m train.predict runs/ucf101 video.mp4 --render out.mp4

exit code: 0 done; 1 a video could not be used or a file not written, though the
  others were, or nothing could be: the last line says why; 130, 143 stopped"""


def main(arguments: list[str] | None = None) -> None:
    """Command line: score videos one after the other."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    with tidy_end():
        _run(options)


def _run(options: argparse.Namespace) -> None:
    """The work of `main`. SystemExit, with its message, if it fails."""
    try:
        _check(options)
        predictor = Predictor(
            options.run,
            device="cuda" if options.gpus else "cpu",
            protocol=FAST if options.fast else None,
            method=options.method,
        )
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        sys.exit(f"error: {describe_error(error)}")
    found = [_predict(predictor, video, options) for video in options.videos]
    if options.json:
        print(json.dumps({"run": str(options.run), "classes": predictor.classes, "videos": found}, indent=1))
    if any("error" in entry for entry in found):
        sys.exit(1)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m train.predict",
        description="Score videos with a run's nets: frames and flow by the run's own method, 25 x 10 views of\n"
        "each video, both streams averaged.",
        epilog=_EXAMPLES,
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder of train.launch")
    parser.add_argument("videos", type=Path, nargs="+", metavar="VIDEO", help="video file of any length")
    parser.add_argument("--fast", action="store_true", help=f"look at {FAST} instead of 25 x 10: for a first look")
    parser.add_argument("--top", type=int, default=5, metavar="K", help="best classes to show (default: 5)")
    parser.add_argument("--json", action="store_true", help="print all scores as JSON, and nothing else")
    parser.add_argument(
        "--timeline",
        action="store_true",
        help="also slide over each video: print what is best when, and draw the scores over time in VIDEO.timeline.png",
    )
    parser.add_argument(
        "--render", type=Path, metavar="OUT.mp4", help="write the video with its flow and the top three"
    )
    parser.add_argument(
        "--every",
        type=float,
        metavar="S",
        help=f"of --timeline and --render: seconds from window to window (default: {EVERY_S})",
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="of --timeline: folder of the figures (default: this one)"
    )
    parser.add_argument("--gpus", type=int, choices=(0, 1), default=0, help="1: compute on a GPU (default: 0, the CPU)")
    parser.add_argument(
        "--method",
        choices=list(FLOW_METHODS),
        help="how to compute flow, only for a run that was trained on flow of another tool",
    )
    return parser


def _check(options: argparse.Namespace) -> None:
    """Raise ValueError for what would fail only after all the work, or do nothing."""
    names = [video.name for video in options.videos]
    if options.top < 1:
        raise ValueError(f"--top {options.top}: ask for one class at least.")
    if not (options.timeline or options.render) and options.every is not None:
        raise ValueError(f"--every {options.every} is of --timeline and --render: give one of them, or leave it out.")
    if options.every is not None and not 0 < options.every < math.inf:
        raise ValueError(f"--every {options.every}: the seconds from window to window are positive, such as 0.5.")
    if not options.timeline and options.out is not None:
        raise ValueError(f"--out {options.out} is of --timeline: give that, or leave it out.")
    if options.timeline and len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(
            f"--timeline with two videos of the name {twice}: their figures would be one. Score one first."
        )
    if options.out is not None and options.out.exists() and not options.out.is_dir():
        raise ValueError(f"--out {options.out} is no folder.")
    if options.render:
        if len(names) > 1:
            raise ValueError(f"--render {options.render} with {len(names)} videos: render one at a time.")
        check_mp4(options.render)
        check_apart(options.render, options.videos)
    if options.gpus:
        import torch

        if not torch.cuda.is_available():
            raise ValueError("--gpus 1: torch finds no GPU here; leave it out to compute on the CPU.")


def _predict(predictor: Predictor, video: Path, options: argparse.Namespace) -> dict[str, Any]:
    """One video, told as it is found unless in JSON, and what JSON has of it: with "error" if something failed."""

    def tell(*parts: object) -> None:
        if not options.json:
            print(*parts, sep="\n  ", end="\n\n", flush=True)

    found: dict[str, Any] = {"video": str(video)}
    try:
        if not video.exists():
            raise ValueError(f"there is no such file.{nearest_path(video)}")
        if video.is_dir():
            raise ValueError("is a folder: give the files in it, such as FOLDER/*.mp4.")
        prediction = predictor(video)
        tell(describe(prediction, options.top))
        found |= _as_json(prediction, options.top)
        if options.timeline or options.render:
            timeline = predictor.timeline(video, options.every or EVERY_S)
            tell(describe_timeline(timeline))
            found["timeline"] = _timeline_as_json(timeline)
            figure = (options.out or Path()) / f"{video.name}.timeline.png"
            wrote = [draw_timeline(timeline, figure)] if options.timeline else []
            wrote += [render_timeline(predictor, timeline, options.render)] if options.render else []
            tell("wrote:", *wrote)
    except (ValueError, OSError, RuntimeError, ImportError) as error:  # the next video may do
        found["error"] = describe_error(error)
        print(f"error: {printable(video)}: {found['error']}", file=sys.stderr)
    return found


def describe(prediction: Prediction, k: int) -> str:
    """The k best classes in lines, with what each stream says of them."""
    methods = [FUSED] * (FUSED in prediction.scores) + [name for name in STREAMS if name in prediction.scores]
    best = prediction.top(k)
    width = max(len(name) for name, _ in best)
    seconds = prediction.num_frames / prediction.fps
    lines = [
        f"{printable(prediction.video)}: {prediction.num_frames:,} frames, {seconds:.1f} s; {prediction.protocol}",
        f"{'':{width + 4}}{''.join(f'{method:>10}' for method in methods)}",
    ]
    for rank, (name, _) in enumerate(best, 1):
        number = prediction.classes.index(name)
        values = "".join(f"{prediction.scores[method][number]:10.3f}" for method in methods)
        lines.append(f"{rank:>3} {name:{width}}{values}")
    return "\n".join(lines)


def describe_timeline(timeline: Timeline) -> str:
    """What is best when, in lines."""
    return "\n".join(
        f"  {_clock(start)} - {_clock(end)}  {name} {score:.2f}" for start, end, name, score in spans(timeline)
    )


def _clock(seconds: float) -> str:
    minutes, tenths = divmod(round(10 * seconds), 600)
    return f"{minutes:3}:{tenths / 10:04.1f}"


def _as_json(prediction: Prediction, k: int) -> dict[str, Any]:
    return {
        "num_frames": prediction.num_frames,
        "fps": prediction.fps,
        "views": prediction.protocol.num_taus * len(prediction.protocol.views),
        "top": [{"class": name, "score": score} for name, score in prediction.top(k)],
        "scores": {method: scores.tolist() for method, scores in prediction.scores.items()},
    }


def _timeline_as_json(timeline: Timeline) -> dict[str, Any]:
    return {
        "frames": timeline.frames.tolist(),
        "times_s": timeline.times_s.tolist(),
        "scores": {method: scores.tolist() for method, scores in timeline.scores.items()},
    }


if __name__ == "__main__":
    main()
