"""The parts of a run's report: sentences that open it, and its sections, each from the files in the run's folder."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from flow.canvas import to_svg
from flow.page import Block, Code, Columns, Details, Grid, Heading, Picture, Text, plural
from flow.untrusted import printable, read_bounded, read_json
from train.config import read_config, to_flat
from train.confused import show_confused, worst_confused
from train.curves import draw_curves
from train.figures import MAX_RESULTS_BYTES, confusion_figure, filters_figure, recall_figure
from train.fuse import fuse_runs
from train.log import read_log
from train.origin import NAME as ORIGIN
from train.origin import read_made_on, read_origin
from train.scores import read_scores, score_file
from train.settings import STREAMS, Config

_MAX_CONFIG_BYTES = 1 << 20
#: Pairs of classes that are listed where the matrix has too many to be read.
_NUM_CONFUSIONS = 10
_READABLE_CLASSES = 20
_PCT = "\u00a0%"  # never at the beginning of a line


def guarded(section: Callable[..., list[Block]], *arguments: Any) -> list[Block]:
    """A section's blocks, or in their place why there are none."""
    try:
        return section(*arguments)
    except (ValueError, OSError, ImportError) as error:
        return [Text(f"Left out: {printable(' '.join(str(error).split()), 1000)}")]
    except Exception as error:  # what a damaged file may bring to light has no bounds
        return [Text(f"Left out, for a file is damaged: {printable(repr(error), 1000)}")]


def sentence(part: Callable[[Path], str], run: Path) -> str:
    """What the part says, or nothing where a file is missing or damaged: the section that needs it says why."""
    try:
        return part(run)
    except Exception:
        return ""


# --- reading -----------------------------------------------------------------------------------------------------


def _config(run: Path) -> Config:
    return read_config(_there(run / "config.yaml", "`train.launch` writes it when a run begins."))


def _results(folder: Path) -> dict[str, Any]:
    path = _there(
        folder / "results.json",
        "it comes at the end of `train.launch`; from scores that are there, `python -m train.fuse` makes it.",
    )
    try:
        return dict(read_json(path, MAX_RESULTS_BYTES))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is damaged: {error!r:.200}. `python -m train.fuse` makes it again.") from None


def _there(path: Path, how: str) -> Path:
    if not path.exists():
        raise FileNotFoundError(f"there is no {path.name} yet: {how}")
    return path


def _streams(run: Path) -> list[str]:
    """Streams of which the run has anything."""
    return [stream for stream in STREAMS if (run / stream).is_dir()]


def _logs(run: Path) -> tuple[dict[str, list[dict[str, Any]]], list[Block]]:
    """Stream -> records of its log; and what is to say of logs that are damaged."""
    logs: dict[str, list[dict[str, Any]]] = {}
    said: list[Block] = []
    for stream in _streams(run):
        try:
            if (run / stream / "log.jsonl").exists():
                logs[stream] = read_log(run / stream / "log.jsonl")
        except (ValueError, OSError) as error:
            said.append(Text(f"The {stream} log is left out: {printable(error, 1000)}"))
    return logs, said


def _main_method(methods: Mapping[str, Any]) -> str:
    """The fused scores; of one stream alone, its own. Averaging has nothing fitted to it."""
    return "average" if "average" in methods else next(iter(methods))


# --- the first paragraph -----------------------------------------------------------------------------------------


def _what(run: Path) -> str:
    config = _config(run)
    streams, (logs, _) = config.train.streams, _logs(run)
    try:
        origin = read_origin(run, config)
        data = f"{origin.name or origin.root} ({len(origin.classes)} classes)"
    except ValueError:
        data = config.data.root
    steps = list(dict.fromkeys(_steps(logs.get(stream, []), config.stream(stream).steps) for stream in streams))
    nets = f"The {streams[0]} net" if len(streams) == 1 else "Both nets"
    width = f" at {config.model.width:g} of its width" if config.model.width != 1 else ""
    return (
        f"{nets}, CNN-M{width}, trained on {config.data.train_list or config.data.split} of {printable(data)} for "
        f"{' and '.join(steps)} steps of {plural(config.train.batch_size, 'sample')}."
    )


def _steps(log: Sequence[Mapping[str, Any]], steps: int) -> str:
    done = log[-1]["step"] if log else 0
    return f"{steps:,}" if done >= steps else f"{done:,} of {steps:,}"


def _when(run: Path) -> str:
    """From the names of the TensorBoard files, and the rates in the logs."""
    names = [path.name for path in run.glob("*/events.out.tfevents.*")]
    begun = min(int(found[1]) for name in names if (found := re.search(r"tfevents\.(\d{10})\.", name)))
    batch_size, seconds = _config(run).train.batch_size, 0.0
    for log in _logs(run)[0].values():
        for former, line in zip([{"step": 0}, *log], log, strict=False):
            seconds += (line["step"] - former["step"]) * batch_size / line["samples_per_s"]
    return f"Begun on {datetime.fromtimestamp(begun, UTC):%Y-%m-%d at %H:%M} UTC; training took {_duration(seconds)}."


def _duration(seconds: float) -> str:
    for unit_s, unit in ((86_400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * unit_s:
            return f"{seconds / unit_s:.{int(unit_s > 60)}f} {unit}"
    return f"{seconds:.0f} seconds"


def _headline(run: Path) -> str:
    methods = _results(run)["methods"]
    found = methods[_main_method(methods)]
    low, high = found["interval_95_pct"]
    videos = plural(found["num_videos"], "test video")
    return (
        f"**{printable(found['title'])}: {found['accuracy_pct']:.1f}{_PCT}** of {videos} right "
        f"(95{_PCT} interval {low:.1f} to {high:.1f}{_PCT})."
    )


# --- sections ----------------------------------------------------------------------------------------------------


def _result(run: Path) -> list[Block]:
    if not (run / "results.json").exists() and _config(run).eval.num_taus == 0:
        return [Text("This run has no test (`eval.num_taus=0`): its net serves as another's beginning.")]
    blocks = _result_table(run)
    if stale := sentence(_stale, run):
        blocks.append(Text(stale))
    return blocks + guarded(_further_tables, run)


def _further_tables(run: Path) -> list[Block]:
    """The tables of further data sets that streams were trained on, where they are tested too."""
    blocks: list[Block] = []
    for stream in _streams(run):
        for number, root in enumerate(_config(run).stream(stream).extra_roots, 1):
            task = run / stream / f"task{number}"
            if (task / "results.json").exists():
                blocks.append(Heading(f"The {stream} net on a further data set, {printable(root)}", 3))
                blocks += guarded(_result_table, task)
    return blocks


def _result_table(folder: Path) -> list[Block]:
    """results.json as the table that `train.results.report` prints."""
    content = _results(folder)
    rows, with_top5 = [], any("top5_pct" in found for found in content["methods"].values())
    for method, found in content["methods"].items():
        low, high = found["interval_95_pct"]
        title = printable(found["title"]) + (f" (C = {content['svm_C']:g})" if method == "svm" else "")
        share = f"{found['num_correct']}/{found['num_videos']}"
        top5 = [f"{found['top5_pct']:.1f}{_PCT}"] if with_top5 else []
        rows.append([title, share, f"{found['accuracy_pct']:.1f}{_PCT}", f"{low:.1f} to {high:.1f}{_PCT}", *top5])
    head = ["", "correct", "accuracy", f"95{_PCT} interval"] + ["top\u00a05"] * with_top5
    what = f"{content['split_list']}, {plural(len(content['labels']), 'video')}, {len(content['classes'])} classes"
    blocks: list[Block] = [Grid(head, rows), Text(printable(what) + ".")]
    return blocks + ([Text(f"No SVM: {printable(content['no_svm'], 1000)}")] if content["no_svm"] else [])


def _stale(run: Path) -> str:
    """A sentence if the scores are not those that results.json was made of."""
    of = {source["name"]: source["checkpoint"] for source in _results(run)["sources"]}
    for stream in of.keys() & set(_streams(run)):
        path = score_file(run / stream, "test")
        if path.exists() and read_scores(path).checkpoint != of[stream]:
            return f"The {stream} scores are newer than this table: `python -m train.fuse` makes it again."
    return ""


def _training(run: Path) -> list[Block]:
    logs, said = _logs(run)
    if any(logs.values()):
        return said + draw_curves(logs)
    return said or [Text("There is no log.jsonl yet: `train.launch` writes one, a line every `train.log_every` steps.")]


def _confusion(run: Path) -> list[Block]:
    content = _results(run)
    method, classes = _main_method(content["methods"]), content["classes"]
    are_many = len(classes) > _READABLE_CLASSES
    matrix = _picture(confusion_figure(run, method), "Confusion matrix: a row is a true class.", are_many)
    recall = _picture(recall_figure(run, method), "Recall of each class, best first.", are_many)
    if not are_many:
        return [Columns([matrix, recall], least_px=420)]
    confusion = content["methods"][method]["confusion"]
    pairs = [(-count, i, j) for i, row in enumerate(confusion) for j, count in enumerate(row) if count and i != j]
    rows = [[str(-count), printable(classes[i]), printable(classes[j])] for count, i, j in sorted(pairs)]
    worst = Grid(["videos", "true", "predicted"], rows[:_NUM_CONFUSIONS])
    return [matrix, Text("Most frequent confusions:"), worst, recall]


def _picture(figure: Any, caption: str, is_wide: bool = False) -> Picture:
    """A figure; a wide one keeps the size at which it can be read, and moves sideways on a phone."""
    return Picture(to_svg(figure), "image/svg+xml", caption, round(70 * figure.get_figwidth()) if is_wide else 0)


def _worst(run: Path) -> list[Block]:
    config = _config(run)
    results = fuse_runs([run], config.fuse, svm=False)
    method = _main_method(results.scores)
    videos = worst_confused(results, method)
    if not videos:
        return [Text("None: every test video is recognised.")]
    num_wrong = int((results.predicted[method] != results.labels).sum())
    which = f"The {len(videos)} worst of " if num_wrong > len(videos) else ""
    said = (
        f"{which}{plural(num_wrong, 'misclassified test video')}, worst first: by how far the predicted class is above "
        f"the true one in the scores of {printable(results.titles[method])}."
    )
    return [Text(said), *show_confused(videos, config, results.dataset)]


def _filters(run: Path) -> list[Block]:
    blocks: list[Block] = []
    for stream in _streams(run):
        blocks += guarded(_filters_of, run, stream)
    if not blocks:
        raise FileNotFoundError(
            "there is no checkpoint yet: `train.launch` writes one every `train.checkpoint_every` steps."
        )
    return blocks


def _filters_of(run: Path, stream: str) -> list[Block]:
    figure = filters_figure(run, stream)
    return [_picture(figure, f"{stream}: a column is a filter, a row an input channel.", is_wide=True)]


def _setup(run: Path) -> list[Block]:
    config = _config(run)
    origin = read_origin(run, config)
    flow = origin.flow or {}
    size = f"{origin.size_px} px, the smaller side"
    rows = [
        ["data set", f"{origin.name or 'unnamed'}, {origin.root}"],
        ["fingerprint", f"`{origin.fingerprint}`"],
        ["classes", f"{len(origin.classes)}"],
        ["frames", size],
        ["flow", _plain({key: value for key, value in flow.items() if key != "parameters"}) or "none"],
        ["parameters", _plain(flow.get("parameters") or {}) or "none"],
        ["codec", _plain(origin.codec)],
    ]
    return [Grid(["", ""], [[name, printable(value, 1000)] for name, value in rows])]


def _plain(values: Mapping[str, Any]) -> str:
    said = {key: f"{value:g}" if isinstance(value, float) else value for key, value in values.items()}
    return ", ".join(f"{key} {value}" for key, value in said.items() if value is not None)


def _resolved(run: Path) -> list[Block]:
    text = read_bounded(_there(run / "config.yaml", "`train.launch` writes it when a run begins."), _MAX_CONFIG_BYTES)
    whole = Details("The whole config", [Code(text.decode("utf-8", "replace"))])
    return [*guarded(_differences, run), whole]


def _differences(run: Path) -> list[Block]:
    default, own = to_flat(Config()), to_flat(_config(run))
    rows = [
        [f"`{key}`", printable(value), printable(default[key])] for key, value in own.items() if value != default[key]
    ]
    return [
        Text("What differs from the defaults, which are the paper's:"),
        Grid(["setting", "this run", "default"], rows),
    ]


def _machine(run: Path) -> list[Block]:
    made_on = read_made_on(run)
    if not made_on:
        return [Text(f"Not known: there is no {ORIGIN}, which `train.launch` writes, or it is damaged.")]
    found = [{**here["machine"], **here["versions"], "commit": _short(here["commit"])} for here in made_on]
    keys = list(dict.fromkeys(key for here in found for key in here))
    rows = [[key, *(_cell(here.get(key)) for here in found)] for key in keys]
    head = [""] + ([""] if len(found) == 1 else [f"{number}." for number in range(1, len(found) + 1)])
    return [Grid([*head], rows)]


def _short(commit: str) -> str:
    return re.sub(r"\b([0-9a-f]{12})[0-9a-f]{28}\b", r"\1", commit)


def _cell(value: object) -> str:
    return printable(", ".join(map(str, value)) or "none" if isinstance(value, list) else value)


#: The first paragraph: what was trained on what, when, and what came of it.
LEAD = (_what, _when, _headline)

SECTIONS: dict[str, Callable[[Path], list[Block]]] = {
    "Result": _result,
    "Training": _training,
    "Confusion and recall": _confusion,
    "Worst-confused test videos": _worst,
    "First-layer filters": _filters,
    "Data": _setup,
    "Config": _resolved,
    "Machine and versions": _machine,
}
