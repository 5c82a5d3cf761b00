"""flow.pack: the same bytes however the work was cut up, and every video that cannot be packed is named."""

import contextlib
import dataclasses
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest

from flow import devices, fragment, pack, pool
from flow.catalog import list_videos
from flow.clips import read_clips
from flow.codec import Codec, decode_component, decode_rgb
from flow.devices import count_gpus, count_workers
from flow.extract import flow_method
from flow.pool import run_pool, worker_number
from flow.resume import locked
from flow.video import import_cv2, read_frames, to_grey, write_video
from tests.deadly import write_or_fail
from tests.faults import processes
from tests.faults.processes import is_running
from tests.test_video import moving_frames, replace_frame


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Seven sound videos in three classes, of different lengths and sizes; one longer than a clip."""
    root = tmp_path_factory.mktemp("videos")
    for number, (class_name, num_frames) in enumerate(
        [("Run", 5), ("Run", 70), ("Run", 64), ("Sit", 2), ("Sit", 6), ("Walk", 9), ("Walk", 7)]
    ):
        (root / class_name).mkdir(exist_ok=True)
        frames = moving_frames(num_frames, 64, 64 + 16 * (number % 3), seed=number)
        write_video(root / class_name / f"v{number} [{class_name}]!.avi", frames)
    return root


def run(videos, out, *options):
    return pack.main(["--videos", str(videos), "--out", str(out), "--size", "48", *options])


def contents(out):
    """SHA-256 of all that must not depend on how the work was done: all but dataset.json, which holds seconds."""
    files = [path for path in out.rglob("*") if path.is_file() and path.name != "dataset.json"]
    return {str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def packed(videos, tmp_path_factory):
    """The videos packed in one go, two to a shard, with backward fields."""
    out = tmp_path_factory.mktemp("packed") / "set"
    assert run(videos, out, "--videos-per-shard", "2", "--backward", "--workers", "2") == 0
    return out


def test_every_frame_and_field_is_in_the_shards(videos, packed):
    codec = Codec()
    clips = {}
    for path in sorted(packed.glob("shard-*.tar")):
        content = path.read_bytes()
        for clip in read_clips(path):
            clips.setdefault(clip.video_id, []).append((clip, content))
    assert sorted(clips) == [video.video_id for video in list_videos(videos)]
    for video in list_videos(videos):
        frames = list(read_frames(video.path, 48))
        greys = [to_grey(frame) for frame in frames]
        found = {kind: set() for kind in ("rgb", "dx", "dy", "bdx", "bdy")}
        assert [clip.is_last for clip, _ in clips[video.video_id]] == [False] * ((len(frames) - 1) // 64) + [True]
        for clip, content in clips[video.video_id]:
            assert (clip.class_name, clip.class_id) == (video.class_name, None)
            assert (clip.height, clip.width) == greys[0].shape
            for kind, (first, entries) in clip.entries.items():
                for t, row in enumerate(entries, first):
                    assert t // 64 == clip.first_frame // 64
                    found[kind].add(t)
                    if t > 3 and t < len(frames) - 2:
                        continue  # enough seen
                    jpeg = content[row["offset"] : row["offset"] + row["size"]]
                    if kind == "rgb":
                        assert np.abs(decode_rgb(jpeg).astype(int) - frames[t]).mean() < 8
                        continue
                    step = -1 if kind.startswith("b") else 1
                    component = flow_method()(greys[t], greys[t + step])[kind.endswith("y") * 1]
                    decoded = decode_component(jpeg, row["lo"], row["hi"])
                    assert np.abs(decoded - component).mean() < 0.02 * (row["hi"] - row["lo"]) + 1e-3
                    assert row["mean"] == np.float32(component.mean(dtype=np.float64))
        T = len(frames)
        assert found["rgb"] == set(range(T)) and found["dx"] == found["dy"] == set(range(T - 1))
        assert found["bdx"] == found["bdy"] == set(range(1, T))
    assert codec.metadata() == json.loads((packed / "dataset.json").read_text())["codec"]


def test_dataset_json_adds_up(videos, packed):
    dataset = json.loads((packed / "dataset.json").read_text())
    summary = dataset["summary"]
    assert (dataset["num_videos"], dataset["num_frames"], dataset["num_fields"]) == (7, 163, 2 * 156)
    assert [entry["name"] for entry in dataset["classes"]] == ["Run", "Sit", "Walk"]
    assert [shard["name"] for shard in dataset["shards"]] == [f"shard-{n:06d}.tar" for n in range(4)]
    for shard in dataset["shards"]:
        content = (packed / shard["name"]).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (shard["bytes"], shard["sha256"])
    pixels = sum(
        2 * 2 * (len(frames) - 1) * frames[0].shape[0] * frames[0].shape[1]
        for frames in (list(read_frames(video.path, 48)) for video in list_videos(videos))
    )
    assert summary["float32_bytes"] == 4 * pixels and summary["ratio"] == 4 * pixels / summary["flow_bytes"] > 5
    assert 0 < summary["quantisation_error_mean_px"] < summary["quantisation_error_max_px"] < 1
    assert 0 < summary["flow_s_per_pair"] < summary["s_per_pair"] < 1
    assert dataset["flow"]["method"] == "dis" and dataset["size_px"] == 48 and dataset["backward"] is True
    assert not (packed / ".pack").exists() and not (packed / "bad_videos.txt").exists()


def test_splits_name_each_video_once(videos, packed):
    train, test = ((packed / f"splits/split1_{side}.txt").read_text().splitlines() for side in ("train", "test"))
    assert sorted(train + test) == [video.video_id for video in list_videos(videos)] and len(test) == 3


def test_the_number_of_workers_does_not_show(videos, packed, tmp_path):
    assert run(videos, tmp_path / "set", "--videos-per-shard", "2", "--backward", "--workers", "1") == 0
    assert contents(tmp_path / "set") == contents(packed)


@pytest.mark.parametrize("num_shards", [1, 3])
def test_a_killed_pack_goes_on_and_ends_with_the_same_bytes(videos, packed, tmp_path, num_shards):
    out = tmp_path / "set"
    options = ["--videos-per-shard", "2", "--backward", "--workers", "1"]
    command = [sys.executable, "-m", "flow.pack", "--videos", videos, "--out", out, "--size", "48", *options]
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while len(list(out.glob(".pack/shard-*.json"))) < num_shards and process.poll() is None:
        time.sleep(0.002)
    process.kill()
    process.wait()
    assert not (out / "dataset.json").exists()
    before = {path: path.stat().st_mtime_ns for path in out.glob("shard-*.tar")}
    finished = {out / f"{path.stem}.tar" for path in out.glob(".pack/shard-*.json")}
    (out / "shard-000003.tar.tmp").write_bytes(b"half a shard")
    assert run(videos, out, *options) == 0
    assert contents(out) == contents(packed)
    assert len(finished) >= num_shards
    assert all(path.stat().st_mtime_ns == before[path] for path in finished), "a finished shard was packed again"


def test_workers_do_not_outlive_a_killed_parent(videos, tmp_path):
    command = [sys.executable, "-m", "flow.pack", "--videos", str(videos), "--out", str(tmp_path / "set")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not list(tmp_path.glob("set/.pack/run-*/*")) and process.poll() is None:
        time.sleep(0.01)
    children = open(f"/proc/{process.pid}/task/{process.pid}/children").read().split()
    process.kill()
    process.wait()
    deadline = time.monotonic() + 20
    while any(is_running(child) for child in children):
        assert time.monotonic() < deadline, "workers outlive their parent"
        time.sleep(0.05)


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_sigterm_end_a_pack_with_one_line_and_no_process(videos, tmp_path, stop):
    out = tmp_path / "set"
    process = processes.start("flow.pack", ["--videos", videos, "--out", out, "--method", "tvl1", "--workers", 2])
    assert processes.wait_until(lambda: any(out.glob(".pack/run-*/*")) or process.poll() is not None)
    family = processes.tree(process.pid)
    assert len(family) >= 3
    os.kill(process.pid, stop)  # to the parent alone, who has to see to the others
    output = process.communicate(timeout=60)[0]
    assert output == "Stopped. The same command goes on with the shards that are left.\n"
    assert process.returncode == 128 + stop
    assert processes.wait_until(lambda: not any(map(is_running, family)))
    assert sorted(path.name for path in (out / ".pack").iterdir()) == ["lock", "settings.json"]


def test_a_signal_that_an_import_swallows_comes_again(monkeypatch):
    monkeypatch.setattr(pool, "_AGAIN_S", 0.05)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt, match=str(int(signal.SIGTERM))), pool.interruptible():
        with contextlib.suppress(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(30)
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_signal_that_comes_while_a_process_is_started_waits_for_it(monkeypatch):
    """Half started, the process would end with a traceback. A mask does not help: another thread takes the signal."""
    started = []

    def submit(self, function, task):
        interrupt = signal.getsignal(signal.SIGTERM)
        interrupt(signal.SIGTERM, None)  # as Python calls it in the main thread, whatever thread the signal came to
        started.append(task)

    with pool._Pool(1) as workers:
        monkeypatch.setattr(pool.ProcessPoolExecutor, "submit", submit)
        with pytest.raises(KeyboardInterrupt, match=str(int(signal.SIGTERM))), pool.interruptible():
            workers.start(str, "task")
            assert started == ["task"]
            time.sleep(30)
        monkeypatch.undo()


@contextlib.contextmanager
def slow_cleanup(done):
    """Takes ten times as long as until an interrupt comes again, and handles errors of its own meanwhile."""
    try:
        yield
    finally:
        for _ in range(10):
            with contextlib.suppress(FileNotFoundError):
                os.stat("no such file")
            try:
                os.stat("no such file")
            except FileNotFoundError:
                time.sleep(pool._AGAIN_S)
        done.append("cleaned")


def slowly_cleaned(done):
    with slow_cleanup(done):
        yield from range(3)


def hold_slowly(done):
    with slow_cleanup(done):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(30)


def iterate_slowly(done):
    for _ in slowly_cleaned(done):  # closed when it is forgotten, while the interrupt is on its way
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(30)


@pytest.mark.parametrize("work", [hold_slowly, iterate_slowly])
def test_a_cleanup_is_cut_off_by_no_signal_that_comes_again(monkeypatch, work):
    monkeypatch.setattr(pool, "_AGAIN_S", 0.02)
    done = []
    with pytest.raises(KeyboardInterrupt, match=str(int(signal.SIGTERM))), pool.interruptible():
        work(done)
    assert done == ["cleaned"]


def test_a_second_ctrl_c_cuts_a_cleanup_off(monkeypatch):
    monkeypatch.setattr(pool, "_AGAIN_S", 0.02)
    done = []
    with pytest.raises(KeyboardInterrupt), pool.interruptible(), slow_cleanup(done):
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(30)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(30)
    assert done == ["cleaned"]


def test_a_complete_pack_is_left_alone(videos, packed, capsys):
    before = contents(packed)
    assert run(videos, packed, "--videos-per-shard", "2", "--backward") == 0
    assert "nothing to do" in capsys.readouterr().out and contents(packed) == before
    assert run(videos, packed, "--videos-per-shard", "2", "--method", "farneback", "--range", "20") == 2
    message = capsys.readouterr().err
    assert all(text in message for text in ("flow.method: 'dis' before, 'farneback' now", "codec.range", "backward"))
    assert "size_px" not in message and contents(packed) == before


def damage(folder):
    """Seven unusable videos."""
    folder.mkdir()
    (folder / "text.avi").write_bytes(b"no video " * 99)
    (folder / "empty.mp4").write_bytes(b"")
    write_video(folder / "one.avi", moving_frames(1))
    write_video(folder / "cut.avi", moving_frames(9))
    content = (folder / "cut.avi").read_bytes()
    (folder / "cut.avi").write_bytes(content[: len(content) // 2])
    for name in ("size.avi", "hole.avi", "late.avi"):
        write_video(folder / name, moving_frames(70 if name == "late.avi" else 9))
    small = import_cv2().imencode(".jpg", np.full((48, 64, 3), 90, np.uint8))[1].tobytes()
    replace_frame(folder / "size.avi", 5, small)
    replace_frame(folder / "hole.avi", 5, b"")
    replace_frame(folder / "late.avi", 68, b"")  # when the first clip is already written
    return folder


def test_bad_videos_are_named_and_the_rest_is_packed(videos, tmp_path, capsys):
    root, out = tmp_path / "videos", tmp_path / "set"
    root.mkdir()
    (root / "Walk").symlink_to(videos / "Walk")
    damage(root / "Bad")
    options = ["--videos-per-shard", "1"]
    assert run(root, out, *options) == 1
    report = dict(line.split("\t") for line in (out / "bad_videos.txt").read_text().splitlines())
    reasons = {"cut": "truncated", "empty": "cannot be opened", "hole": "damaged", "late": "damaged", "one": "1 frame"}
    reasons |= {"size": "changes size", "text": "cannot be opened"}
    assert sorted(report) == [f"Bad/{name}" for name in sorted(reasons)]
    assert all(reason in report[f"Bad/{name}"] for name, reason in reasons.items())
    dataset = json.loads((out / "dataset.json").read_text())
    assert dataset["num_videos"] == 2 and dataset["summary"]["bad"] == 7 and len(dataset["shards"]) == 2
    assert [entry["name"] for entry in dataset["classes"]] == ["Walk"]
    assert not any("Bad" in path.read_text() for path in (out / "splits").iterdir())
    assert "Bad/cut is truncated" in capsys.readouterr().out
    assert run(root, out, *options) == 1 and (out / "bad_videos.txt").exists()
    assert run(root, out, *options, "--skip-bad") == 0
    assert run(root, tmp_path / "skipped", "--skip-bad") == 0


def test_a_video_on_which_the_gpu_fails_is_tried_again_alone_and_then_bad(videos, tmp_path, monkeypatch):
    root, out = tmp_path / "videos", tmp_path / "set"
    for video in list_videos(videos)[2:5]:
        (root / video.class_name).mkdir(parents=True, exist_ok=True)
        (root / video.class_name / video.path.name).symlink_to(video.path)
    monkeypatch.setattr(pack, "write_fragment", write_or_fail)
    assert run(root, out, "--workers", "1") == 1
    (bad,) = (out / "bad_videos.txt").read_text().splitlines()
    failure = "RuntimeError: CUDA out of memory. Tried to allocate 2 GiB"
    assert bad == f"Run/v2 [Run]!\tfails, also when tried again alone: {failure}"
    assert json.loads((out / "dataset.json").read_text())["num_videos"] == 2


def test_a_machine_that_fails_costs_no_video(videos, tmp_path, monkeypatch, capsys):
    root, out = tmp_path / "videos", tmp_path / "set"
    for video in list_videos(videos)[2:5]:
        (root / video.class_name).mkdir(parents=True, exist_ok=True)
        (root / video.class_name / video.path.name).symlink_to(video.path)
    with monkeypatch.context() as patch:
        patch.setattr(pack, "write_fragment", write_or_fail)
        patch.setattr(devices, "prove", partial(raise_, ValueError("dis cannot compute flow on 'cuda:0': device lost")))
        assert run(root, out, "--workers", "1") == 2 and "device lost" in capsys.readouterr().err
    assert not (out / "dataset.json").exists()
    assert run(root, out) == 0 and json.loads((out / "dataset.json").read_text())["num_videos"] == 3


def raise_(error, *_):
    raise error


def test_parameters_that_fail_do_not_bind_the_folder(videos, tmp_path, capsys):
    root, out = tmp_path / "videos", tmp_path / "set"
    root.mkdir()
    (root / "Sit").symlink_to(videos / "Sit")
    assert run(root, out, "--method", "brox", "--set", "scale=1.5") == 2
    assert "brox cannot compute flow on 'cpu' with scale=1.5" in capsys.readouterr().err
    assert run(root, out, "--method", "dis", "--set", "PatchSize=0") == 2  # which ends the process
    assert "dis ends its process on 'cpu' with {'PatchSize': 0}" in capsys.readouterr().err
    assert run(root, out, "--set", "PatchSize=10") == 0


# --- batches -----------------------------------------------------------------------------------------------------


class Methods:
    """In the place of `flow_method`: as DIS, in batches, on any device; notes batches, devices and threads."""

    def __init__(self, batch_pairs):
        self.batch_pairs, self.sizes, self.devices, self.threads = batch_pairs, [], set(), set()

    def __call__(self, name, device, parameters):
        method = flow_method(name, "cpu", parameters)
        self.devices.add(device)

        def calc(grey0, grey1):
            self.sizes.append(len(grey0))
            self.threads.add(threading.current_thread())
            return method.batch(grey0, grey1)

        return dataclasses.replace(method, batch_pairs=self.batch_pairs, _calc=calc)


def fragment_of(video, path, monkeypatch, methods, **options):
    """Report and bytes of a video's fragment, made in this process."""
    monkeypatch.setattr(fragment, "flow_method", methods)
    recipe = fragment.Recipe(**{"size_px": 48, "method": "dis", "codec": Codec(), "backward": True, **options})
    report = fragment.write_fragment(fragment.FragmentTask(video, "Run/v", "Run", None, path, recipe))
    return report, path.read_bytes() if path.exists() else None


@pytest.mark.parametrize("num_gpus", [0, 2])
def test_a_video_is_cut_into_batches_and_lost_nothing(videos, tmp_path, monkeypatch, num_gpus):
    video = list_videos(videos)[1].path  # of 70 frames
    expected = fragment_of(video, tmp_path / "single", monkeypatch, Methods(1))[1]
    for batch_pairs, sizes in ((3, [3] * 23), (16, [16] * 4 + [5]), (69, [69]), (200, [69])):
        methods = Methods(batch_pairs)
        monkeypatch.setattr(fragment, "worker_number", lambda: 3)
        report, content = fragment_of(video, tmp_path / "f", monkeypatch, methods, num_gpus=num_gpus)
        assert content == expected and methods.sizes[::2] == methods.sizes[1::2] == sizes
        assert report.totals.num_fields == 2 * 69 and 0 < report.totals.flow_s < report.totals.video_s
        assert methods.devices == {"cuda:1" if num_gpus else "cpu"}
        assert (methods.threads == {threading.current_thread()}) == (num_gpus == 0)
        assert not any(t.is_alive() for t in methods.threads - {threading.current_thread()})


@pytest.mark.parametrize("num_gpus", [0, 2])
def test_a_bad_video_leaves_neither_file_nor_thread(tmp_path, monkeypatch, num_gpus):
    folder, methods = damage(tmp_path / "Bad"), Methods(16)
    report, content = fragment_of(folder / "late.avi", tmp_path / "f", monkeypatch, methods, num_gpus=num_gpus)
    assert "damaged" in report.bad["Run/v"] and content is None
    monkeypatch.setattr(fragment, "encode_component", lambda *_: 1 / 0)
    methods = Methods(2)
    with pytest.raises(ZeroDivisionError):
        fragment_of(folder / "late.avi", tmp_path / "f", monkeypatch, methods, num_gpus=num_gpus)
    assert sum(methods.sizes) < 20, "it went on without need"
    assert not any(t.is_alive() for t in methods.threads - {threading.current_thread()})


def test_parameters_of_the_method_are_used_and_recorded(videos, tmp_path, monkeypatch, capsys):
    given = {"FinestScale": 2, "PatchSize": 10}
    video = list_videos(videos)[0].path
    plain, other = (
        fragment_of(video, tmp_path / "f", monkeypatch, flow_method, parameters=parameters)[1]
        for parameters in ({}, given)
    )
    assert plain != other
    root, out = tmp_path / "videos", tmp_path / "set"
    root.mkdir()
    (root / "Sit").symlink_to(videos / "Sit")
    assert run(root, out, "--set", "FinestScale=2", "--set", "PatchSize=10") == 0
    parameters = json.loads((out / "dataset.json").read_text())["flow"]["parameters"]
    assert given.items() <= parameters.items() and parameters.keys() == flow_method().parameters.keys()
    assert run(root, out) == 2 and "flow.parameters.FinestScale: 2 before, 1 now" in capsys.readouterr().err


def test_gpus_are_those_that_are_visible_or_asked_for(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=SimpleNamespace(device_count=lambda: 3)))
    assert [count_gpus("brox", asked) for asked in (None, 0, 2, 3)] == [3, 0, 2, 3]
    assert [count_gpus("dis", asked) for asked in (None, 0)] == [0, 0]
    for asked in (-1, 4):
        with pytest.raises(ValueError, match=f"gpus={asked}: torch sees 3 here"):
            count_gpus("brox", asked)
    monkeypatch.setattr("flow.devices.default_num_workers", lambda: 20)
    asked = [(None, 0), (None, 1), (None, 3), (None, 32), (5, 4)]
    assert [count_workers(*a) for a in asked] == [20, 8, 20, 32, 5]
    with pytest.raises(ValueError, match="gpus=2: dis runs on the CPU; on a GPU run brox, nvof"):
        count_gpus("dis", 2)


def test_every_gpu_has_a_process(videos, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(devices, "count_gpus", lambda *_: 4)
    assert run(videos, tmp_path / "set", "--method", "brox", "--workers", "3") == 2
    assert "workers=3 for gpus=4: a process uses one GPU" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["brox", "nvof"])
def test_a_pack_on_a_gpu(videos, tmp_path, method):
    root, out = tmp_path / "videos", tmp_path / "set"
    root.mkdir()
    (root / "Sit").symlink_to(videos / "Sit")
    assert run(root, out, "--method", method, "--size", "128", "--gpus", "1", "--workers", "2") == 0
    dataset = json.loads((out / "dataset.json").read_text())
    assert dataset["flow"]["device"] == "cuda" and dataset["summary"]["bad"] == 0 and dataset["num_fields"] > 0


def test_nothing_to_pack_is_an_error(tmp_path, capsys):
    damage(tmp_path / "videos").rename(tmp_path / "Bad")
    (tmp_path / "videos").mkdir()
    (tmp_path / "Bad").rename(tmp_path / "videos/Bad")
    for _ in range(2):
        assert run(tmp_path / "videos", tmp_path / "set") == 2
        assert "None of the 7 videos can be packed; Bad/cut is truncated" in capsys.readouterr().err
    assert not (tmp_path / "set/dataset.json").exists()


def test_listed_videos_that_are_missing_are_counted(videos, tmp_path, capsys):
    present = [video.video_id for video in list_videos(videos)]
    lists = tmp_path / "lists"
    lists.mkdir()
    (lists / "classInd.txt").write_bytes(b"7 Run\r\n8 Sit\r\n9 Walk\r\n")
    # The names end in "!.avi" as in HMDB-51, and hold a blank.
    labels = {"Run": 7, "Sit": 8, "Walk": 9}
    train = [f"{video_id}.avi {labels[video_id.split('/')[0]]}\r\n" for video_id in present[:4]]
    (lists / "trainlist01.txt").write_bytes("".join([*train, "Run/gone.avi 7\r\n"]).encode())
    (lists / "testlist01.txt").write_bytes("".join(f"{video_id}.avi\r\n" for video_id in present[4:]).encode())
    options = ["--splits", str(lists)]
    assert run(videos, tmp_path / "set", *options) == 0 and "1 listed videos" in capsys.readouterr().out
    assert run(videos, tmp_path / "strict", *options, "--strict") == 1
    dataset = json.loads((tmp_path / "set/dataset.json").read_text())
    assert dataset["name"] == "ucf101" and dataset["summary"]["listed_missing"] == 1
    assert dataset["classes"][0] == {"name": "Run", "official_id": 7}
    assert (tmp_path / "set/missing_videos.txt").read_text() == "Run/gone\n"
    assert (tmp_path / "set/splits/split1_train.txt").read_text().splitlines() == present[:4]
    clip = next(read_clips(tmp_path / "set/shard-000000.tar"))
    assert clip.class_id == labels[clip.class_name]


def test_a_pack_of_other_videos_is_not_gone_on_with(videos, tmp_path, capsys):
    root, out = tmp_path / "videos", tmp_path / "set"
    for video in list_videos(videos):
        (root / video.class_name).mkdir(parents=True, exist_ok=True)
        (root / video.class_name / video.path.name).write_bytes(video.path.read_bytes())
    assert run(root, out) == 0
    write_video(root / "Walk" / "new.avi", moving_frames(3))
    assert run(root, out) == 2 and "input_sha256" in capsys.readouterr().err
    (out / "dataset.json").unlink()
    assert run(root, out) == 2 and "holds shards of no pack that could go on" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--quality", "0"], "quality=0"),
        (["--range", "wide"], "range 'wide'"),
        (["--size", "4"], "size_px=4"),
        (["--workers", "0"], "num_workers=0"),
        (["--set", "gamma"], "expected key=value"),
        (["--set", "FinestScal=1"], "Did you mean 'FinestScale'"),
        (["--dataset", "hmdb51"], "needs its official list files"),
    ],
)
def test_unusable_options_are_explained(videos, tmp_path, capsys, options, message):
    assert run(videos, tmp_path / "set", *options) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "set").exists()


def test_a_running_pack_is_not_disturbed(videos, tmp_path, capsys):
    with locked(tmp_path / ".pack"):
        assert run(videos, tmp_path) == 2
    assert "Another pack into" in capsys.readouterr().err


# --- pool --------------------------------------------------------------------------------------------------------


def work(task):
    """Kills its process for task 3, always; for task 5, once; fails for task -1."""
    number, folder = task
    if number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    if number == 5 and not (folder / "killed").exists():
        (folder / "killed").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    if number == -1:
        raise OSError("No space left on device")
    return number * number


def test_a_process_that_dies_costs_only_its_own_task(tmp_path):
    for numbers in (range(5), range(4, 9)):
        results = {task[0]: result for task, result in run_pool(work, [(n, tmp_path) for n in numbers], 2)}
        assert results == {n: None if n == 3 else n * n for n in numbers}
    assert (tmp_path / "killed").exists()


def test_an_exception_of_a_task_is_raised(tmp_path):
    with pytest.raises(OSError, match="No space left"):
        list(run_pool(work, [(1, tmp_path), (-1, tmp_path)], 2))


def fail(task):
    """Tasks from 4 on raise a RuntimeError, task 4 only the first time."""
    number, folder = task
    if number > 4 or (number == 4 and not (folder / "failed").exists()):
        (folder / "failed").touch()
        raise RuntimeError(f"CUDA error in {number}")
    return number


def test_a_runtime_error_costs_only_its_own_task(tmp_path):
    tasks = [(n, tmp_path) for n in (0, 1, 4, 2, 6, 3)]
    found = {task[0]: result for task, result in run_pool(fail, tasks, 2, lambda task, error: (task[0], str(error)))}
    assert found == {**{n: n for n in range(5)}, 6: (6, "CUDA error in 6")}


def meet(task):
    """The number of this worker, as soon as three workers are at work."""
    _, folder = task
    (folder / str(worker_number())).touch()
    deadline = time.monotonic() + 20
    while len(list(folder.iterdir())) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    return worker_number()


def test_every_worker_has_a_number_and_no_task_is_forgotten(tmp_path):
    numbers = []
    for _, number in run_pool(meet, [(n, tmp_path) for n in range(9)], 3):
        numbers.append(number)
        time.sleep(0.05)  # meanwhile all that was submitted is done
    assert len(numbers) == 9 and set(numbers) == {0, 1, 2} and worker_number() == 0
