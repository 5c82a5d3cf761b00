"""One video, one answer: the stored score of a test video, whatever its length, as a call, a timeline and a film."""

import json
import shutil
import signal
from dataclasses import replace
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from flow import demo, pack
from flow.pieces import cut_pieces, pack_pieces
from flow.render import SIDE_PX, write_mp4
from flow.video import VideoError, read_frames, resize, write_video
from loaders.index import open_index
from loaders.views import VIEWS
from tests.conftest import random_video
from tests.faults import processes
from tests.test_evaluate import ALONE, save_net
from tests.tiny import tiny_config
from train import predict, predictor
from train.checkpoint import Checkpoint, save_checkpoint
from train.config import write_config
from train.evaluate import evaluate_stream, score_videos, scores_path
from train.model import build_net, stream_spec
from train.origin import origin_of, read_origin, write_origin
from train.predictor import CENTRE_VIEWS, FAST, Predictor, Protocol
from train.scores import read_scores
from train.tasks import open_tasks
from train.timeline import draw_timeline, render_timeline, spans


def make_run(run, root, streams=("spatial", "temporal"), **changes):
    """A run whose nets were not trained but whose test scores are stored, as after train.launch."""
    changes = {"train__streams": list(streams), "eval__num_taus": 4, "eval__num_taus_train": 0, **changes}
    config, index = tiny_config(root, **changes), open_index(root)
    shutil.rmtree(run, ignore_errors=True)
    run.mkdir(parents=True)
    write_config(config, run / "config.yaml")
    write_origin(run, index)
    for stream in streams:
        save_net(config, stream, index, run, step=10)
        evaluate_stream(config, stream, index, run, ALONE)
    return run


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """Nets this small lose much by more."""
    monkeypatch.setattr(predictor, "default_num_workers", lambda: 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """videos/, those packed in sets of several kinds, and runs on them."""
    folder = tmp_path_factory.mktemp("predict")
    demo.generate(folder / "videos", num_train=1, num_test=1, num_frames=14)
    lists = ["--splits", str(folder / "videos" / "splits"), "--dataset", "ucf101"]
    for name, options in {
        "dis": [],
        "backward": ["--backward", "--method", "farneback", "--set", "winsize=9", "--camera", "homography",
                     "--range", "20", "--quality", "75"],
    }.items():  # fmt: skip
        out = ["--size", "48", "--out", str(folder / name)]
        assert pack.main(["--videos", str(folder / "videos"), *lists, *out, *options]) == 0
    make_run(folder / "run", folder / "dis")
    return folder


def video_of(folder, video_id):
    return folder / "videos" / f"{video_id}.avi"


@pytest.mark.parametrize(
    ("root", "changes"),
    [
        ("dis", {"eval__num_taus": 25}),
        ("dis", {"data__L": 20}),  # longer than the videos: their last field is repeated
        ("dis", {"data__size": 60, "data__crop_px": 52, "train__streams": "[temporal]"}),
        ("dis", {"data__rgb_frames": 11, "train__streams": "[spatial]"}),
        ("dis", {"data__stacking": "trajectory", "train__streams": "[temporal]"}),
        ("backward", {"data__bidirectional": True, "data__L": 4}),
    ],
)
def test_a_packed_test_video_gets_its_stored_score(folder, tmp_path, root, changes):
    streams = {"[temporal]": ["temporal"], "[spatial]": ["spatial"]}.get(changes.pop("train__streams", ""))
    run = make_run(tmp_path / "run", folder / root, streams=streams or ("spatial", "temporal"), **changes)
    predict_video = Predictor(run)
    stored = {stream: read_scores(scores_path(run, stream, "test")) for stream in predict_video.config.train.streams}
    video_ids = next(iter(stored.values())).video_ids
    for i, video_id in list(enumerate(video_ids))[:2]:
        prediction = predict_video(video_of(folder, video_id))
        for stream, scores in stored.items():
            np.testing.assert_allclose(prediction.scores[stream], scores.scores[i], atol=1e-6)
            assert np.abs(scores.scores[i] - scores.scores[i - 1]).max() > 1e-4  # another video's are others
        if len(stored) == 2:
            both = np.mean([scores.scores[i] for scores in stored.values()], axis=0)
            np.testing.assert_allclose(prediction.scores["average"], both, atol=1e-6)
        best = np.argmax(list(prediction.scores.values())[-1])
        assert prediction.top(1)[0][0] == open_index(folder / root).classes[best]
        assert prediction.num_frames == 14 and prediction.fps == 25


def test_a_long_video_is_cut_and_scores_the_same(folder, tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    base = rng.integers(0, 255, (60, 80, 3)).astype(np.uint8)
    write_video(tmp_path / "long.avi", (np.roll(base, (2 * t, t), (0, 1)) for t in range(90)))
    protocol = Protocol(25, CENTRE_VIEWS)
    whole = Predictor(folder / "run", protocol=protocol)(tmp_path / "long.avi")
    sizes = []

    def small(frames, pieces, *args):
        for group in pack_pieces(frames, pieces, *args, max_frames=12):
            sizes.append(sum(pieces[number].stop - pieces[number].start for number in group))
            yield group

    monkeypatch.setattr(predictor, "cut_pieces", partial(cut_pieces, max_frames=9))
    monkeypatch.setattr(predictor, "pack_pieces", small)
    cut = Predictor(folder / "run", protocol=protocol)(tmp_path / "long.avi")
    assert len(sizes) > 5 and max(sizes) <= 12
    for stream in whole.scores:
        np.testing.assert_allclose(cut.scores[stream], whole.scores[stream], atol=1e-6)


def test_the_fast_mode_is_the_centre_of_five_stacks(folder):
    """Against the loader without DALI, on the packed set."""
    from loaders.reference import view_loader

    run, root = folder / "run", folder / "dis"
    video_id = read_scores(scores_path(run, "temporal", "test")).video_ids[3]
    fast = Predictor(run, protocol=FAST)
    index, config = open_index(root), fast.config
    spec, rows = stream_spec(config, "temporal"), index.rows([video_id])
    net = save_net(config, "temporal", index, folder / "scratch").eval()
    with torch.inference_mode():
        batches = list(view_loader(index, rows, spec, num_taus=5, batch_size=5))
        expected = [net(batches[n].inputs).double().softmax(1).numpy() for n in CENTRE_VIEWS]
    assert [VIEWS[n] for n in CENTRE_VIEWS] == [(0.5, 0.5, False), (0.5, 0.5, True)]
    found = fast(video_of(folder, video_id)).scores["temporal"]
    np.testing.assert_allclose(found, np.concatenate(expected).mean(0), atol=1e-5)


def test_a_timeline_slides_over_the_video(folder):
    """Each window has the scores of the stack, and of the frame, in whose middle it is."""
    from loaders.reference import view_loader

    run, root = folder / "run", folder / "dis"
    video_id = read_scores(scores_path(run, "spatial", "test")).video_ids[0]
    timeline = Predictor(run).timeline(video_of(folder, video_id), every_s=0.12)
    assert (timeline.every, timeline.num_frames) == (3, 14)
    assert timeline.frames.tolist() == [1, 4, 7, 10, 13]
    index, config = open_index(root), tiny_config(root)
    for stream, taus in (("spatial", [1, 4, 7, 10, 13]), ("temporal", [0, 2, 5, 8, 10])):  # L = 3: frames tau..tau+3
        spec, rows = stream_spec(config, stream), np.repeat(index.rows([video_id]), 5)
        net = save_net(config, stream, index, folder / "scratch").eval()
        with torch.inference_mode():
            batches = list(view_loader(index, rows, spec, taus=np.array(taus), batch_size=5))
            expected = np.mean([net(batches[n].inputs).double().softmax(1).numpy() for n in CENTRE_VIEWS], axis=0)
        np.testing.assert_allclose(timeline.scores[stream], expected, atol=1e-5)
    both = np.mean([timeline.scores["spatial"], timeline.scores["temporal"]], axis=0)
    np.testing.assert_allclose(timeline.scores["average"], both)


def test_spans_are_the_video_without_gaps(folder):
    run = folder / "run"
    video_id = read_scores(scores_path(run, "spatial", "test")).video_ids[0]
    timeline = Predictor(run).timeline(video_of(folder, video_id), every_s=0.12)
    scores = np.array([[0.9, 0.1], [0.7, 0.3], [0.2, 0.8], [0.6, 0.4], [0.5, 0.5]])
    made = replace(timeline, classes=["a", "b"], scores={"spatial": scores})
    found = spans(made)
    assert [name for _, _, name, _ in found] == ["a", "b", "a"]
    assert [time for start, end, *_ in found for time in (start, end)] == pytest.approx(
        [0, 0.24, 0.24, 0.36, 0.36, 0.56]
    )
    assert [score for *_, score in found] == pytest.approx([0.8, 0.8, 0.55])


def test_the_film_shows_the_video_its_flow_and_the_scores(folder, tmp_path):
    run = folder / "run"
    video = video_of(folder, read_scores(scores_path(run, "spatial", "test")).video_ids[0])
    nets = Predictor(run)
    timeline = nets.timeline(video, every_s=0.12)
    scores = np.tile([[0.5], [0.05], [0.3], [0.1], [0.03], [0.02]], (1, 5)).T
    scores[3:, 5] = 0.9  # from frame 9 on another class is the best
    render_timeline(nets, replace(timeline, scores={"average": scores}), tmp_path / "out.mp4")
    shown = [frame for frame in read_frames(tmp_path / "out.mp4")]
    assert len(shown) == timeline.num_frames
    assert cv2.VideoCapture(str(tmp_path / "out.mp4")).get(cv2.CAP_PROP_FPS) == pytest.approx(25)
    width = shown[0].shape[1] // 2
    for t, frame in enumerate(read_frames(video, 48)):
        left = shown[t][:SIDE_PX, :width].astype(float)
        assert np.abs(left - resize(frame, SIDE_PX)[:, :width]).mean() < 12
    flow = shown[5][:SIDE_PX, width:].astype(float)
    assert flow.std(2).mean() > 3 > shown[0][:SIDE_PX, width:].astype(float).std(2).mean()  # frame 0 has no flow: white
    bars = [(panel[SIDE_PX:, :, 2].astype(int) - panel[SIDE_PX:, :, 0] > 100).sum(1).max() for panel in shown]
    assert 1.6 * bars[5] < bars[12] < 2.0 * bars[5]  # the best one's bar, of 0.5 and of 0.9


def test_a_film_that_cannot_be_written_leaves_nothing(tmp_path):
    frames = [np.zeros((32, 32, 3), np.uint8)]
    with pytest.raises(VideoError, match="ends in .mp4"):
        write_mp4(tmp_path / "a.avi", frames, 25)
    with pytest.raises(VideoError, match="cannot be written: its folder is not there"):
        write_mp4(tmp_path / "none" / "a.mp4", frames, 25)
    with pytest.raises(VideoError, match="at least one frame"):
        write_mp4(tmp_path / "a.mp4", [], 25)

    def fails():
        yield from frames
        raise VideoError("is damaged")

    with pytest.raises(VideoError, match="is damaged"):
        write_mp4(tmp_path / "a.mp4", fails(), 25)
    assert list(tmp_path.iterdir()) == []


def test_sigterm_ends_it_with_one_line_and_no_file(folder, tmp_path, monkeypatch):
    base = np.random.default_rng(0).integers(0, 255, (60, 80, 3)).astype(np.uint8)
    write_video(tmp_path / "long.avi", (np.roll(base, t, 0) for t in range(1000)))
    place = tmp_path / "temporary"
    place.mkdir()
    monkeypatch.setenv("TMPDIR", str(place))
    process = processes.start("train.predict", [folder / "run", tmp_path / "long.avi", "--timeline", "--every", "0.04"])
    assert processes.wait_until(lambda: any(place.glob("two-stream-*")) or process.poll() is not None)
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=60)[0].splitlines()[-1] == "Stopped."
    assert process.returncode == 128 + signal.SIGTERM and list(place.iterdir()) == []


def test_a_folder_in_the_place_of_a_video_is_named(folder, capsys):
    with pytest.raises(SystemExit, match="1"):
        predict.main([str(folder / "run"), str(folder / "videos")])
    assert "videos: is a folder: give the files in it" in capsys.readouterr().err


def test_the_command_goes_on_after_a_bad_video(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    good = video_of(folder, read_scores(scores_path(folder / "run", "spatial", "test")).video_ids[0])
    cut = tmp_path / "cut.avi"
    cut.write_bytes(good.read_bytes()[:-2000])
    arguments = [str(folder / "run"), str(cut), str(good.with_name("absent.avi")), str(good), "--fast"]
    with pytest.raises(SystemExit, match="1"):
        predict.main([*arguments, "--json", "--timeline"])
    out, err = capsys.readouterr()
    content = json.loads(out)
    assert [("error" in entry, Path(entry["video"]).name) for entry in content["videos"]] == [
        (True, "cut.avi"), (True, "absent.avi"), (False, good.name)
    ]  # fmt: skip
    assert "cut.avi: is truncated" in err and "absent.avi: there is no such file" in err
    entry = content["videos"][2]
    prediction = Predictor(folder / "run", protocol=FAST)(good)
    assert entry["scores"] == {stream: scores.tolist() for stream, scores in prediction.scores.items()}
    assert [(best["class"], best["score"]) for best in entry["top"]] == prediction.top(5)
    assert len(entry["timeline"]["times_s"]) == len(entry["timeline"]["scores"]["average"])
    assert (tmp_path / f"{good.name}.timeline.png").read_bytes().startswith(b"\x89PNG")
    predict.main([str(folder / "run"), str(good), "--fast", "--top", "3"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["average", "spatial", "temporal"]
    assert [line.split()[1] for line in lines[2:5]] == [name for name, _ in prediction.top(3)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{run}s", "x.avi"], "is no run folder: no config.yaml. Did you mean '.*run'"),
        (["{run}", "x.avi", "y.avi", "--render", "o.mp4"], "with 2 videos: render one at a time"),
        (["{run}", "x.avi", "--render", "o.webm"], "give a name that ends in .mp4"),
        (["{run}", "x.avi", "--render", "none/o.mp4"], "its folder is not there"),
        (["{run}", "x.avi", "--render", "{folder}"], "it is a folder, or its folder is read-only"),
        (["{run}", "{video}", "--render", "{link}"], "would be written over the video"),
        (["{run}", "x.avi", "--timeline", "--every", "inf"], "seconds from window to window are positive"),
        (["{run}", "x.avi", "--every", "2"], "is of --timeline and --render"),
        (["{run}", "x.avi", "--out", "."], "is of --timeline: give that"),
        (["{run}", "a/x.avi", "b/x.avi", "--timeline"], "two videos of the name x.avi"),
        (["{run}", "x.avi", "--top", "0"], "ask for one class at least"),
        (["{run}", "x.avi", "--method", "tvl1"], "was trained on dis, and flow of another method gives other scores"),
    ],
)
def test_a_wrong_request_is_told_at_once(folder, tmp_path, arguments, message):
    video = tmp_path / "v.avi"
    shutil.copy(next((folder / "videos").rglob("*.avi")), video)
    (tmp_path / "link.mp4").symlink_to(video)
    (tmp_path / "folder.mp4").mkdir()
    places = {
        "{folder}": tmp_path / "folder.mp4",
        "{run}": folder / "run",
        "{video}": video,
        "{link}": tmp_path / "link.mp4",
    }
    for place, path in places.items():
        arguments = [argument.replace(place, str(path)) for argument in arguments]
    before = video.read_bytes()
    with pytest.raises(SystemExit, match=message):
        predict.main(arguments)
    assert video.read_bytes() == before


def test_a_run_is_enough_without_its_packed_set(folder, tmp_path):
    run = make_run(tmp_path / "run", shutil.copytree(folder / "dis", tmp_path / "set"))
    video = video_of(folder, read_scores(scores_path(run, "spatial", "test")).video_ids[0])
    before = Predictor(run, protocol=FAST)(video)
    (tmp_path / "set").rename(tmp_path / "gone")
    after = Predictor(run, protocol=FAST)(video)
    assert {k: v.tolist() for k, v in after.scores.items()} == {k: v.tolist() for k, v in before.scores.items()}
    (run / "run.json").unlink()  # an older run has none: then the set tells
    with pytest.raises(ValueError, match="run.json is missing, and so is the packed data set"):
        Predictor(run)
    (tmp_path / "gone").rename(tmp_path / "set")
    assert Predictor(run, protocol=FAST)(video).top(1) == before.top(1)


def test_a_run_that_is_not_one_is_refused(folder, tmp_path):
    run = make_run(tmp_path / "run", folder / "dis", streams=["temporal"])
    content = json.loads((run / "run.json").read_text())
    for change, message in (
        ({"fingerprint": "0" * 16}, "they do not belong together"),
        ({"classes": content["dataset"]["classes"][:-1]}, "temporal net has 6 outputs, run.json names 5 classes"),
        ({"classes": [*content["dataset"]["classes"], "Zoo"]}, "temporal net has 6 outputs, run.json names 7 classes"),
        ({"flow": {**content["dataset"]["flow"], "parameters": {"Speed": 3}}}, "dis has no parameter 'Speed'"),
        ({"flow": {"method": "tv-l1 of ours", "parameters": {}}}, "flow of another tool.*Name the method"),
    ):
        changed = {**content, "dataset": {**content["dataset"], **change}}
        (run / "run.json").write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=message):
            Predictor(run)
    origin = read_origin(run, tiny_config(folder / "dis"))
    assert origin.flow["method"] == "tv-l1 of ours"
    assert Predictor(run, method="dis").recipe.method == "dis"
    (run / "temporal" / "checkpoint.pt").unlink()
    with pytest.raises(FileNotFoundError, match="no checkpoint at .*train this stream first"):
        Predictor(run, method="dis")


def test_a_run_with_further_tasks_scores_its_own_classes(folder, tmp_path):
    config = tiny_config(folder / "dis", train__streams=["temporal"], eval__num_taus=4, eval__num_taus_train=0)
    options = {"extra_roots": [str(folder / "backward")], "extra_lists": ["split1_train"], "extra_as": "tasks"}
    config = replace(config, temporal=replace(config.temporal, **options))
    index = open_index(folder / "dis")
    run = tmp_path / "run"
    tasks = open_tasks(replace(config, eval=replace(config.eval, num_taus=0)), "temporal", index)
    net = build_net(config, "temporal", sum(tasks.num_outputs), ALONE.device)
    (run / "temporal").mkdir(parents=True)
    state = Checkpoint("temporal", 10, net.state_dict(), {}, {}, tasks.fingerprint)
    save_checkpoint(state, run / "temporal" / "checkpoint.pt")
    write_config(config, run / "config.yaml")
    write_origin(run, index)
    rows = index.split("split1_test")[:1]
    expected, _ = score_videos(net.eval(), config, "temporal", index, rows, 4, ALONE, tasks.columns(0))
    found = Predictor(run)(video_of(folder, index.video_ids(rows)[0]))
    assert found.classes == index.classes and list(found.scores) == ["temporal"]
    np.testing.assert_allclose(found.scores["temporal"], expected[0], atol=1e-6)


@pytest.mark.parametrize("shape", [(2, 60, 80), (9, 160, 50)])
def test_the_shortest_video_and_a_portrait(folder, tmp_path, shape):
    """And names that matplotlib would take for mathematics."""
    frames, _ = random_video(np.random.default_rng(1), *shape)
    video = tmp_path / "a $5 _$ b.avi"
    write_video(video, frames)
    nets = Predictor(folder / "run", protocol=FAST)
    assert nets(video).scores["average"].sum() == pytest.approx(1)
    timeline = nets.timeline(video)
    assert draw_timeline(timeline, tmp_path / "t.png").stat().st_size > 1000
    render_timeline(nets, timeline, tmp_path / "out.mp4")
    assert len(list(read_frames(tmp_path / "out.mp4"))) == shape[0]


def test_frames_of_another_tool_are_taken_at_their_own_size(folder):
    root = shutil.copytree(folder / "dis", folder / "external")
    content = json.loads((root / "dataset.json").read_text())
    del content["size_px"]
    (root / "dataset.json").write_text(json.dumps(content))
    assert origin_of(open_index(root)).size_px == 48


def test_times_are_rounded_before_they_are_divided():
    assert [predict._clock(seconds).strip() for seconds in (0, 59.94, 59.96, 3599.99)] == [
        "0:00.0", "0:59.9", "1:00.0", "60:00.0"
    ]  # fmt: skip


@pytest.mark.gpu
def test_a_gpu_gives_the_same_scores(folder):
    video = video_of(folder, read_scores(scores_path(folder / "run", "spatial", "test")).video_ids[0])
    cpu, gpu = (Predictor(folder / "run", device=device)(video) for device in ("cpu", "cuda"))
    for stream in cpu.scores:
        np.testing.assert_allclose(gpu.scores[stream], cpu.scores[stream], atol=0.02)
