"""Sound inputs of every target, small, made on the spot by our own writers."""

import io
import json
import tarfile
import tempfile
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np

from flow.codec import Codec, encode_component, encode_rgb
from flow.image_sources import IMAGE_EXTENSIONS
from flow.index import build_index
from flow.shard import FORMAT_VERSION, Clip, Member, shard_name, write_clip, write_json
from flow.video import VIDEO_EXTENSIONS, import_cv2, write_video
from tests.conftest import pack_arrays, random_video, smooth_noise

_SHAPE = (3, 16, 24)  # num_frames, height, width
#: Frames and fields of the loader's targets are squares of this size; their video has so many fields.
JPEG_PX, JPEG_STEPS = 32, 10


@cache
def _work() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="fuzz-seeds-")


def _folder(name: str) -> Path:
    return Path(_work().name) / name


@cache
def packed_set(backward: bool) -> Path:
    """A packed set of three videos in two shards. Not to be changed."""
    rng = np.random.default_rng(1)
    videos = {name: random_video(rng, *_SHAPE) for name in ("run/a", "walk/b", "walk/c")}
    if backward:
        videos = {name: (*video, video[1]) for name, video in videos.items()}
    root = pack_arrays(_folder(f"set{int(backward)}"), videos, videos_per_shard=2)
    dataset = json.loads((root / "dataset.json").read_bytes())
    classes = [{"name": name, "official_id": None} for name in ("run", "walk")]
    write_json(root / "dataset.json", {**dataset, "classes": classes, "num_videos": 3, "flow": {"camera": None}})
    return root


@cache
def indexes() -> list[bytes]:
    return [(packed_set(backward) / "index.bin").read_bytes() for backward in (True, False)]


@cache
def dataset_jsons() -> list[bytes]:
    return [(packed_set(True) / "dataset.json").read_bytes()]


@cache
def shards() -> list[bytes]:
    """A clip of every kind, without the padding to whole records that follows a tar."""
    return [_without_padding((packed_set(backward) / shard_name(1)).read_bytes()) for backward in (True, False)]


def _without_padding(tar: bytes) -> bytes:
    content = tar.rstrip(b"\0")
    return content + bytes(-len(content) % 512 + 1024)


def clip_parts(backward: bool) -> tuple[bytes, bytes, bytes]:
    """A shard of one clip: the tar header of its JSON, the JSON, and all that follows the JSON's padding."""
    content = shards()[not backward]
    info = tarfile.TarInfo.frombuf(content[:512], "utf-8", "strict")
    end = 512 + info.size
    return content[:512], content[512:end], content[end + -info.size % 512 :]


@cache
def clip_jsons() -> list[bytes]:
    return [clip_parts(backward)[1] for backward in (True, False)]


@cache
def _jpeg_video() -> Clip:
    """A clip of JPEG_STEPS + 1 square frames."""
    frames, fields = random_video(np.random.default_rng(2), JPEG_STEPS + 1, JPEG_PX, JPEG_PX)
    members = {"rgb": {t: Member(encode_rgb(frame, 90)) for t, frame in enumerate(frames)}}
    for c, kind in enumerate(("dx", "dy")):
        members[kind] = {t: Member(*encode_component(field[c], Codec())) for t, field in enumerate(fields)}
    header = dict(video_id="run/a", class_name="run", class_id=None, first_frame=0, num_frames=len(frames))
    return Clip(**header, is_last=True, height=JPEG_PX, width=JPEG_PX, members=members)


def jpeg_set(root: Path, component: bytes | None = None, frame: bytes | None = None) -> Path:
    """A packed set of one video, written to `root`, one image of which is the given bytes; its index agrees."""
    root.mkdir(exist_ok=True)
    clip = _jpeg_video()
    members = {kind: dict(images) for kind, images in clip.members.items()}
    if component is not None:
        members["dx"][3] = Member(component, -2.0, 3.0, 0.5)
    if frame is not None:
        members["rgb"] = dict.fromkeys(members["rgb"], Member(frame))
    buffer = io.BytesIO()
    write_clip(buffer, replace(clip, members=members))
    shard = root / shard_name(0)
    shard.write_bytes(buffer.getvalue() + bytes(1024))
    build_index(root)
    dataset = {"format_version": FORMAT_VERSION, "name": "one", "codec": Codec().metadata(), "num_videos": 1}
    dataset["classes"] = [{"name": "run", "official_id": None}]
    dataset["shards"] = [{"name": shard.name, "bytes": shard.stat().st_size, "sha256": "0" * 64}]
    (root / "dataset.json").write_text(json.dumps(dataset))
    return root


def _images(shape: tuple[int, ...]) -> list[bytes]:
    """JPEGs of one image: of low and high quality, progressive, with restart markers, with its own Huffman tables."""
    cv2 = import_cv2()
    waves = smooth_noise(np.random.default_rng(3), shape[:2], 50) + 128
    image = np.broadcast_to(waves.reshape(*shape[:2], *[1] * (len(shape) - 2)), shape).clip(0, 255).astype(np.uint8)
    options = [[cv2.IMWRITE_JPEG_QUALITY, 90], [cv2.IMWRITE_JPEG_QUALITY, 10], [cv2.IMWRITE_JPEG_PROGRESSIVE, 1]]
    options += [[cv2.IMWRITE_JPEG_RST_INTERVAL, 2], [cv2.IMWRITE_JPEG_OPTIMIZE, 1]]
    return [bytes(cv2.imencode(".jpg", image, option)[1]) for option in options]


@cache
def components() -> list[bytes]:
    return _images((JPEG_PX, JPEG_PX))


@cache
def frames() -> list[bytes]:
    return _images((JPEG_PX, JPEG_PX, 3))


@cache
def split_files() -> list[bytes]:
    """A kind and its files, see targets.NEXT_FILE."""
    ucf101 = [b"ucf101", b"1 run\r\n2 walk\r\n", b"run/a.avi 1\r\nwalk/c.avi 2\r\n", b"walk/b.avi\r\n"]
    hmdb51 = [b"hmdb51", b"a.avi 1 \nx.avi 0 \n", b"b.avi 2 \nc#1 [x].avi 1 \n"]
    return [b"\n====\n".join(files) for files in (ucf101, hmdb51)] + [b"run/a\nwalk/b\n"]


#: Containers and codecs that OpenCV's FFmpeg writes; the last is its own Motion JPEG in AVI.
_CODECS = {".avi": "XVID", ".mp4": "mp4v", ".mov": "MJPG", ".mkv": "XVID", ".webm": "VP80", ".mpg": "PIM1"}
_CODECS |= {".flv": "FLV1", ".wmv": "WMV2", ".ts": "mpg2", ".m4v": "mp4v"}


@cache
def videos() -> list[bytes]:
    """A byte for the extension, and a video of four frames; of as many containers as can be written here."""
    cv2 = import_cv2()
    clip, _ = random_video(np.random.default_rng(4), 4, 32, 32)
    folder = _folder("videos")
    folder.mkdir(exist_ok=True)
    for extension, fourcc in _CODECS.items():
        path = folder / f"clip{extension}"
        writer = cv2.VideoWriter(str(path), cv2.CAP_FFMPEG, cv2.VideoWriter.fourcc(*fourcc), 25.0, (32, 32))
        for frame in clip:
            writer.write(frame)
        writer.release()
    write_video(folder / "mjpeg.avi", clip)
    numbers = {extension: bytes([number]) for number, extension in enumerate(sorted(VIDEO_EXTENSIONS))}
    return [numbers[path.suffix] + path.read_bytes() for path in sorted(folder.iterdir())]


@cache
def image_tars() -> list[bytes]:
    """Two images with their classes."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in (("0.jpg", frames()[0]), ("0.cls", b"0"), ("1.png", b"no image"), ("1.cls", b"1")):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return [_without_padding(buffer.getvalue())]


@cache
def images() -> list[bytes]:
    """One small image in every format that image sets come in."""
    cv2 = import_cv2()
    image = cv2.imdecode(np.frombuffer(frames()[0], np.uint8), cv2.IMREAD_COLOR)
    return [bytes(cv2.imencode(extension, image)[1]) for extension in sorted(IMAGE_EXTENSIONS)] + frames()[1:3]


@cache
def flow_jpegs() -> list[bytes]:
    """Whether a frame, and a JPEG."""
    return [b"\0" + jpeg for jpeg in components()] + [b"\1" + jpeg for jpeg in frames()]


@cache
def flow_folder(root: Path) -> Path:
    """A video of three frames as other tools extract it, in root/run/a."""
    folder = root / "run" / "a"
    folder.mkdir(parents=True)
    for number in (1, 2, 3):
        (folder / f"img_{number:05d}.jpg").write_bytes(frames()[0])
    for axis, number in (("x", 1), ("x", 2), ("y", 1), ("y", 2)):
        (folder / f"flow_{axis}_{number:05d}.jpg").write_bytes(components()[0])
    return root


@cache
def score_files() -> list[bytes]:
    from train.scores import Scores, write_scores

    scores = np.array([[0.25, 0.75], [1.0, 0.0]])
    ids, classes = np.array(["run/a", "walk/b"]), np.array(["run", "walk"])
    names = dict(stream="spatial", split_list="split1_test", dataset="0" * 16, checkpoint="0" * 64)
    numbers = dict(labels=np.array([0, 1]), num_views=np.array([250, 250]))
    path = _folder("scores.npz")
    write_scores(Scores(video_ids=ids, classes=classes, scores=scores, **numbers, **names), path)
    return [path.read_bytes()]


@cache
def configs() -> list[bytes]:
    """Some of the shipped configs, and a list of every kind."""
    from train.config import CONFIG_FOLDER

    lists = b"temporal:\n  extra_roots: [a, b]\n  extra_lists: [all, split1_train]\n  milestones: [5, 10]\n"
    return [path.read_bytes() for path in sorted(CONFIG_FOLDER.glob("*.yaml"))[::6]] + [lists + b"fuse:\n  C: [1]\n"]


@cache
def checkpoints() -> list[bytes]:
    import torch

    from train.checkpoint import Checkpoint, save_checkpoint

    net = {"conv.weight": torch.ones(2, 3), "conv.bias": torch.zeros(2)}
    momentum = {"state": {0: {"momentum_buffer": torch.ones(2, 3)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}
    path = _folder("checkpoint.pt")
    save_checkpoint(Checkpoint("spatial", 7, net, momentum, {"train.seed": 0}, "0" * 16), path)
    return [path.read_bytes()]


@cache
def exported_nets() -> list[bytes]:
    """The least of what describes a net that `load_net` looks at."""
    from nets.cnn_m import CNNM
    from train.export import save_net
    from train.net_card import FORMAT_VERSION

    arguments = dict(num_channels=3, num_classes=3, width=1 / 96, input_px=41, second_lrn=True, num_frames=1)
    about = {"format_version": FORMAT_VERSION, "stream": "spatial", "architecture": {"arguments": arguments}}
    path = _folder("net.safetensors")
    save_net(CNNM(**arguments), {**about, "outputs": {"classes": ["run", "walk"]}}, path)
    return [path.read_bytes()]


@cache
def logs() -> list[bytes]:
    return [
        b'{"step": 20, "loss": 1.5, "accuracy_pct": 40.6, "lr": 0.01, "samples_per_s": 251.3, "data_wait_pct": 3.1}\n'
    ]


@cache
def books() -> list[bytes]:
    from train.record import Book, Entry, write_book

    counts = dict(split=1, seed=0, steps=10, seconds=1.5, resumed=False, gpus=0, accuracy_pct=50.0)
    entry = Entry(name="a", digest="0", test_list="l", correct="01", top5="", made_on="m", **counts)
    path = _folder("book.json")
    tables = dict(
        configs={"0": {"train.seed": 0}}, lists={"l": {"video_ids": ["run/a"]}}, made_on={"m": {"machine": {}}}
    )
    write_book(Book(scale="mini", **tables, runs={entry.key: entry}), path)
    return [path.read_bytes()]
