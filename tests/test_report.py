"""A run's report: what stands in it is what the run's files hold, and nothing in them can fail it."""

import base64
import json
import re
import shutil
import sys
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest

from flow.codec import decode_rgb
from flow.colors import flow_colors
from flow.page import Code, Details, Grid, Heading, Picture, to_html, to_markdown
from flow.video import resize
from loaders.index import open_index
from tests.tiny import made_run
from train import confused, curves, report, report_parts
from train.log import read_log
from train.report import leave_report, write_report
from train.report_parts import SECTIONS
from train.scores import read_scores, write_scores


class Page(HTMLParser):
    """What stands on a page: parts are (tag, text) in order, tables lists of rows, images (type, content, caption)."""

    def __init__(self, text):
        super().__init__()
        self.parts, self.tables, self.images, self.links, self.tags = [], [], [], [], set()
        self._put = lambda data: None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        values = dict(attributes)
        self.links += [values[name] for name in ("src", "href") if name in values]
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            row = self.tables[-1][-1]
            row.append("")
            self._put = lambda data: row.append(row.pop() + data)
        elif tag == "img":
            mime, content = re.fullmatch(r"data:([a-z/+]+);base64,(.*)", values["src"]).groups()
            self.images.append((mime, base64.b64decode(content), values["alt"]))
        elif tag in ("h1", "h2", "h3", "p", "pre"):
            part = [tag, ""]
            self.parts.append(part)
            self._put = lambda data: part.append(part.pop() + data)

    def handle_endtag(self, tag):
        if tag in ("h1", "h2", "h3", "p", "pre", "td", "th"):
            self._put = lambda data: None

    def handle_data(self, data):
        self._put(data.replace("\u00a0", " "))

    def texts(self, *tags):
        return [text for tag, text in self.parts if tag in tags]

    def table(self, *head):
        return next(rows[1:] for rows in self.tables if tuple(rows[0][: len(head)]) == head)

    def below(self, title):
        """The paragraphs of a section."""
        at = self.parts.index(["h2", title])
        ends = [k for k, (tag, _) in enumerate(self.parts) if tag == "h2" and k > at]
        return [text for _, text in self.parts[at + 1 : ends[0] if ends else None]]


def page_of(run):
    return Page(write_report(run).read_text())


@pytest.fixture(scope="module")
def run(packed, tmp_path_factory):
    """A run's folder. Not to be changed."""
    return made_run(packed, tmp_path_factory.mktemp("runs") / "a run")


@pytest.fixture(scope="module")
def page(run):
    return page_of(run)


@pytest.fixture
def unpainted(monkeypatch):
    """Charts are not painted, which takes most of a report's time."""
    for module in (report_parts, curves):
        monkeypatch.setattr(module, "to_svg", lambda figure: b"<svg/>")


# --- what stands in it -------------------------------------------------------------------------------------------


def test_the_table_is_that_of_results_json(run, page):
    content = json.loads((run / "results.json").read_text())
    rows = page.table("", "correct")
    assert len(rows) == len(content["methods"]) == 4
    for row, (method, found) in zip(rows, content["methods"].items(), strict=True):
        low, high = found["interval_95_pct"]
        title = found["title"] + (f" (C = {content['svm_C']:g})" if method == "svm" else "")
        share = f"{found['num_correct']}/{found['num_videos']}"
        assert row == [title, share, f"{found['accuracy_pct']:.1f} %", f"{low:.1f} to {high:.1f} %"]
    assert f"{content['methods']['average']['accuracy_pct']:.1f} % of 6 test videos right" in page.texts("p")[0]


def test_the_first_lines_say_what_was_trained_on_what(page):
    assert page.texts("h1") == ["a run"]
    lead = page.texts("p")[0]
    assert lead.startswith(
        "Both nets, CNN-M at 0.03125 of its width, trained on split1 of arrays (3 classes) for 10 steps"
    )
    assert re.search(
        r"Begun on \d{4}-\d\d-\d\d at \d\d:\d\d UTC; training took [12] seconds", lead
    )  # 160 samples, 110/s
    assert page.texts("h2") == list(SECTIONS)


def test_config_data_and_machine_are_those_of_the_files(run, page):
    stored = json.loads((run / "run.json").read_text())
    differing = {key: value for key, value, _ in page.table("setting")}
    assert differing["data.L"] == "3" and differing["train.batch_size"] == "8" and "train.momentum" not in differing
    assert page.texts("pre") == [(run / "config.yaml").read_text().rstrip()]
    rows = {row[0]: row[1] for table in page.tables for row in table}
    assert rows["fingerprint"] == stored["dataset"]["fingerprint"]
    for part in ("machine", "versions"):
        for key, value in stored["made_on"][0][part].items():
            assert rows[key] == (str(value) if value != [] else "none")
    assert rows["commit"][:12] == stored["made_on"][0]["commit"][:12]


def test_every_chart_has_a_curve_for_each_stream(page):
    charts = {caption: content.decode() for mime, content, caption in page.images if mime == "image/svg+xml"}
    for chart in curves.CHARTS:
        texts = set(ElementTree.fromstring(charts[chart.title]).itertext())
        assert {"spatial", "temporal", "step"} <= texts
    assert len(charts) == len(curves.CHARTS) + 4
    assert {"run", "sit", "walk"} <= set(ElementTree.fromstring(charts["Recall of each class, best first."]).itertext())


def test_a_curve_is_the_log(run):
    log = read_log(run / "spatial" / "log.jsonl")
    figure = curves._draw(curves.CHARTS[0], {"spatial": curves.points(log, "loss")})
    ((line,),) = [axes.lines for axes in figure.axes]
    assert line.get_xydata().tolist() == [[record["step"], record["loss"]] for record in log]


@pytest.mark.parametrize("num", [1, 300, 301, 4000])
def test_long_logs_are_drawn_as_means_of_neighbours(num):
    rng = np.random.default_rng(0)
    log = [{"step": 20 * k, "loss": float(rng.random()), "lr": 0.1 ** (k * 3 // num)} for k in range(1, num + 1)]
    steps, losses, per_point = curves.points(log, "loss")
    assert len(steps) == len(losses) <= curves.MAX_POINTS and steps == sorted(steps)
    assert (per_point == 1) == (num <= curves.MAX_POINTS)
    sizes = np.array([min(per_point, num - k) for k in range(0, num, per_point)])
    assert np.average(losses, weights=sizes) == pytest.approx(np.mean([record["loss"] for record in log]))
    assert set(curves.points(log, "lr")[1]) <= {record["lr"] for record in log}


def test_the_worst_confused_videos_are_those_of_the_scores(run, page):
    """By hand: sorted by the gap of the mean of both streams' scores."""
    one, two = (read_scores(run / stream / "scores_test.npz") for stream in ("spatial", "temporal"))
    wrong = []
    for v, label in enumerate(one.labels):
        mean = [(a + b) / 2 for a, b in zip(one.scores[v], two.scores[v], strict=True)]
        best = max(mean)
        if mean.index(best) != label:
            names = one.classes[label], one.classes[mean.index(best)]
            said = f"{names[0]} ({mean[label]:.2f}) taken for {names[1]} ({best:.2f}): {one.video_ids[v]}"
            wrong.append((mean[label] - best, said))
    assert 1 < len(wrong) < 6  # one video is right
    captions = [caption for mime, _, caption in page.images if mime == "image/jpeg"]
    assert captions == [said for _, said in sorted(wrong)]
    assert page.below("Worst-confused test videos")[0].startswith(f"{len(wrong)} misclassified test videos")


@pytest.mark.parametrize("video_id", ["walk/wide", "run/long", "walk/short"])
def test_a_thumbnail_is_the_middle_frame_and_its_flow(packed, arrays, video_id):
    frames, fields, _ = arrays[video_id]
    t = (len(frames) - 1) // 2
    image = decode_rgb(confused.thumbnail(open_index(packed), video_id, 4.0)).astype(int)
    left, right = image[1:-1, 1 : image.shape[1] // 2 - 1], image[1:-1, image.shape[1] // 2 + 1 : -1]
    assert left.shape == right.shape and left.shape[0] == confused.SIDE_PX
    colors = (255 * flow_colors(fields[t], 4.0)).astype(np.uint8)
    for found, expected in ((left, frames[t]), (right, colors)):
        assert np.abs(found - resize(expected, confused.SIDE_PX)).mean() < 8
    assert np.abs(left - resize(frames[t + 1], confused.SIDE_PX)).mean() > 20


def test_a_page_needs_no_other_file(run, page):
    assert page.links and all(link.startswith("data:") for link in page.links)
    assert not page.tags & {"script", "iframe", "object"}
    assert "@import" not in (run / report.NAME).read_text() and "url(" not in (run / report.NAME).read_text()


def test_a_run_of_one_stream(packed, tmp_path, unpainted):
    run = made_run(packed, tmp_path / "run", streams=["temporal"])
    page = page_of(run)
    assert page.texts("p")[0].startswith("The temporal net, ")
    assert [row[0] for row in page.table("", "correct")] == ["Temporal ConvNet"]
    assert len(page.images) == len(curves.CHARTS) + 3 + sum(mime == "image/jpeg" for mime, *_ in page.images)


def test_results_on_further_data_sets_are_shown(run, packed, tmp_path, unpainted):
    again = made_run(
        packed, tmp_path / "run", temporal__extra_roots="[a/b <c>]", temporal__extra_lists="[split1_train]"
    )
    (again / "temporal" / "task1").mkdir()
    content = json.loads((run / "results.json").read_text())
    content["methods"] = {"temporal": {**content["methods"]["temporal"], "num_correct": 77, "num_videos": 99}}
    (again / "temporal" / "task1" / "results.json").write_text(json.dumps(content))
    page = page_of(again)
    assert page.texts("h3") == ["The temporal net on a further data set, a/b <c>"]
    tables = [table for table in page.tables if table[0][:2] == ["", "correct"]]
    assert [row[1] for row in tables[1][1:]] == ["77/99"]


def test_scores_newer_than_the_table_are_named(run, tmp_path, unpainted):
    again = shutil.copytree(run, tmp_path / "run")
    assert not [text for text in page_of(again).below("Result") if "newer" in text]
    path = again / "spatial" / "scores_test.npz"
    scores = read_scores(path)
    write_scores(type(scores)(**{**vars(scores), "checkpoint": "another"}), path)
    assert any(
        "spatial scores are newer than this table: python -m train.fuse" in text
        for text in page_of(again).below("Result")
    )


def test_a_page_of_101_classes_stays_small(packed, tmp_path):
    """3,783 videos, of which every second is taken for the next class; 4,000 lines of log."""
    run, K, V = made_run(packed, tmp_path / "run", streams=["temporal"]), 101, 3783
    content = json.loads((run / "results.json").read_text())
    confusion = 18 * (np.eye(K, dtype=int) + np.roll(np.eye(K, dtype=int), 1, axis=1))
    confusion[7, 9] = 99
    content["classes"] = [f"ClassOfANumber{k:03}" for k in range(K)]
    content["methods"]["temporal"] |= {"confusion": confusion.tolist(), "top5_pct": 91.25, "num_videos": V}
    (run / "results.json").write_text(json.dumps(content))
    log = {"loss": 0.123456789, "accuracy_pct": 12.3456789, "lr": 0.01, "samples_per_s": 1e3 / 3, "data_wait_pct": 0.1}
    lines = [
        json.dumps({"step": 20 * k, **{key: value * (1 + k % 7) for key, value in log.items()}}) for k in range(4000)
    ]
    (run / "temporal" / "log.jsonl").write_text("\n".join(lines) + "\n")
    page = page_of(run)
    assert (run / report.NAME).stat().st_size < 1e6
    assert page.table("videos", "true")[0] == ["99", "ClassOfANumber007", "ClassOfANumber009"]
    assert len(page.table("videos", "true")) == 10
    assert page.table("", "correct")[0][-1] == "91.2 %"
    assert "Each point is the mean over up to 14 lines of the log." in page.below("Training")


# --- what is not there, or damaged -------------------------------------------------------------------------------


def test_a_run_without_anything_says_what_makes_each_part(packed, run, tmp_path):
    (tmp_path / "run").mkdir()
    page = page_of(tmp_path / "run")
    assert page.texts("h2") == list(SECTIONS) and not page.images
    shutil.copy(run / "config.yaml", tmp_path / "run")
    page = page_of(tmp_path / "run")
    said = {title: " ".join(page.below(title)) for title in SECTIONS}
    assert "There is no results.json yet: it comes at the end of train.launch" in said["Result"].replace(
        "Left out: t", "T"
    )
    assert "There is no log.jsonl yet: train.launch writes one" in said["Training"]
    assert "python -m train.fuse makes it" in said["Confusion and recall"]
    assert "that python -m train.evaluate RUN has scored" in said["Worst-confused test videos"]
    assert "no checkpoint yet: train.launch writes one" in said["First-layer filters"]
    assert "there is no run.json, which train.launch writes" in said["Machine and versions"]
    assert page.texts("p")[0].startswith("Both nets, ") and "for 0 of 10 steps" in page.texts("p")[0]


DAMAGED = {
    "results.json": ("{", "Result", "results.json is damaged"),
    "./results.json": ('{"methods": {"average": {}}}', "Result", "a file is damaged: KeyError"),
    "spatial/log.jsonl": ("x\n", "Training", "The spatial log is left out: .*log.jsonl, line 1 is damaged"),
    "config.yaml": ("data: {L: x}", "Config", "data.L"),
    "run.json": ('{"dataset": {}}', "Data", "run.json is damaged"),
    "spatial/scores_test.npz": ("PK", "Worst-confused test videos", "scores_test.npz is no score file"),
    "spatial/checkpoint.pt": ("PK", "First-layer filters", "checkpoint.pt is damaged"),
}


#: Other parts that are made of the same file.
ALSO = {
    "results.json": ["Confusion and recall"],
    "./results.json": ["Confusion and recall"],
    "run.json": ["Machine and versions"],
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_costs_its_own_part_alone(run, page, tmp_path, name, unpainted):
    content, title, message = DAMAGED[name]
    again = shutil.copytree(run, tmp_path / "run")
    (again / name).write_text(content)
    damaged = page_of(again)
    assert re.search(message, " ".join(damaged.below(title)))
    assert damaged.texts("h2") == list(SECTIONS)
    if name != "config.yaml":  # which says where everything is
        whole = [other for other in SECTIONS if other not in (title, *ALSO.get(name, []))]
        assert [damaged.below(other) for other in whole] == [page.below(other) for other in whole]


def test_numbers_that_are_none_leave_gaps_and_old_logs_lack_the_accuracy(run, tmp_path, unpainted):
    again = shutil.copytree(run, tmp_path / "run")
    for stream in ("spatial", "temporal"):
        records = read_log(again / stream / "log.jsonl")
        for record in records:
            del record["accuracy_pct"]
        records[3]["loss"], records[4]["loss"], records[5]["loss"] = "x", float("nan"), True
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (again / stream / "log.jsonl").write_text(lines)
        assert len(curves.points(records, "loss")[0]) == 7
    page = page_of(again)
    assert "Accuracy on the training batch, %: no line of the logs has accuracy_pct" in " ".join(page.below("Training"))
    assert "Learning rate" in [caption for *_, caption in page.images]


@pytest.mark.parametrize("what", ["gone", "another", "damaged"])
def test_without_the_very_packed_set_there_is_a_table_in_the_place_of_pictures(
    run, page, packed, tmp_path, unpainted, what
):
    captions = [caption for mime, _, caption in page.images if mime == "image/jpeg"]
    again, root = shutil.copytree(run, tmp_path / "run"), tmp_path / "set"
    config = (again / "config.yaml").read_text()
    (again / "config.yaml").write_text(config.replace(str(packed), str(root)))
    if what != "gone":
        shutil.copytree(packed, root)
    if what == "another":
        metadata = json.loads((root / "dataset.json").read_text())
        metadata["shards"][0]["sha256"] = "0" * 64
        (root / "dataset.json").write_text(json.dumps(metadata))
    if what == "damaged":
        for shard in root.glob("*.tar"):
            shard.write_bytes(bytes(shard.stat().st_size))
    page = page_of(again)
    assert not [mime for mime, *_ in page.images if mime == "image/jpeg"]
    said = page.below("Worst-confused test videos")
    if what == "damaged":  # its size is right, so it is found when a picture is read
        assert [text.partition(". Not shown: ")[0] for text in said[2:]] == captions
        return
    rows = page.table("true class")
    assert [f"{a} ({p}) taken for {b} ({q}): {video}" for a, p, b, q, video in rows] == captions
    assert {"gone": "is no packed data set", "another": "holds another packed set"}[what] in said[-1]


def test_names_are_text_and_nothing_else(packed, tmp_path):
    classes = ["<script>alert(1)</script>", 'a & b\'s "c"', "$\\frac{x$ \x00\x1b[2J\u202e"]
    ids = [f"<img src=x onerror=alert({k})>/&amp;{k}" for k in range(6)]
    run = made_run(packed, tmp_path / "<b>run & co", classes=classes, video_ids=ids)
    page = page_of(run)
    assert "script" not in page.tags and "b" not in page.tags
    assert page.texts("h1") == ["<b>run & co"]
    said = " ".join(page.below("Worst-confused test videos") + [caption for *_, caption in page.images])
    assert "<script>alert(1)</script> (0." in said and "<img src=x onerror=alert(" in said and ">/&amp;" in said
    labels = [ElementTree.fromstring(content) for mime, content, _ in page.images if mime == "image/svg+xml"]
    texts = {text for svg in labels for text in svg.itertext()}
    assert {classes[0], classes[1], "$\\frac{x$ \\x00\\x1b[2J\\u202e"} <= texts


# --- commands ----------------------------------------------------------------------------------------------------


def test_what_hinders_a_report_is_a_warning_of_the_run(run, tmp_path, unpainted, caplog):
    again = shutil.copytree(run, tmp_path / "run")
    (again / report.NAME).unlink()
    (again / report.NAME).mkdir()
    assert leave_report(again) == []
    assert "report.html is not written: " in caplog.text


def test_without_matplotlib_all_but_the_charts_is_there(run, page, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    again = page_of(shutil.copytree(run, tmp_path / "run"))
    assert "figures need matplotlib" in " ".join(again.below("Training"))
    assert again.table("", "correct") == page.table("", "correct")


def test_the_command_writes_the_report_of_each_run_and_names_the_nearest(run, tmp_path, unpainted, capsys):
    runs = [shutil.copytree(run, tmp_path / name) for name in ("one", "two")]
    report.main(list(map(str, runs)))
    assert capsys.readouterr().out.splitlines() == [f"wrote {run / report.NAME}" for run in runs]
    with pytest.raises(SystemExit, match="twp is no run folder: no config.yaml. Did you mean '.*/two'?"):
        report.main([str(tmp_path / "twp")])


# --- pages -------------------------------------------------------------------------------------------------------


def test_both_renderers_know_every_block():
    blocks = [
        Heading("Title", 1),
        Details("More & more", [Code("a < b")]),
        Picture(b"content", "image/png", 'wide "one"', least_px=700),
        Grid(["", ""], [["a", "b"]]),
    ]
    page, text = to_html(blocks), to_markdown(blocks)
    assert "<details><summary>More &amp; more</summary>\n<pre>a &lt; b</pre>\n</details>" in page
    assert 'alt="wide &quot;one&quot;" style="min-width:700px"' in page and '<div class="wide">' in page
    assert "<thead>" not in page and "<td>a</td><td>b</td>" in page
    assert "More & more\n\n```\na < b\n```" in text and "![wide" in text and "| a | b |" in text
