"""Shared fixtures: packed sets made from arrays, the generated demo set, and the real clips where they are at hand."""

import os
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest

from flow.codec import Codec, encode_component, encode_rgb
from flow.index import build_index, load_index
from flow.shard import (
    CLIP_FRAMES,
    FORMAT_VERSION,
    Clip,
    Member,
    check_video_id,
    commit_shard,
    shard_name,
    write_bytes,
    write_clip,
    write_json,
)

PER_FIELD = Codec()


def smooth_noise(rng, shape, scale=1.0):
    """Smooth random image of mean 0 and about the given standard deviation, from a few random waves."""
    y, x = np.mgrid[: shape[0], : shape[1]].astype(np.float32)
    waves = [np.sin(x * rng.uniform(-0.3, 0.3) + y * rng.uniform(-0.3, 0.3) + rng.uniform(0, 6.3)) for _ in range(6)]
    return (scale * np.sum(waves, axis=0) / np.sqrt(3)).astype(np.float32)


def random_video(rng, num_frames, height, width):
    """Frames (T, H, W, 3) uint8 and fields (T-1, 2, H, W) float32 px/frame without any meaning, but compressible."""
    frames = np.stack(
        [
            np.stack([smooth_noise(rng, (height, width), 50) + 128 for _ in range(3)], axis=-1).clip(0, 255)
            for _ in range(num_frames)
        ]
    ).astype(np.uint8)
    fields = np.stack(
        [
            np.stack([smooth_noise(rng, (height, width), 2) + rng.normal() for _ in range(2)])
            for _ in range(num_frames - 1)
        ]
    )
    return frames, fields


def write_video(file, video_id, class_name, frames, fields, codec=PER_FIELD, backward=None):
    """Write a video's clips into a fragment. backward (T-1, 2, H, W): b_1 .. b_{T-1}."""
    check_video_id(video_id)
    height, width = frames.shape[1:3]
    for first in range(0, len(frames), CLIP_FRAMES):
        last = min(first + CLIP_FRAMES, len(frames))
        members = {"rgb": {t: Member(encode_rgb(frames[t], codec.quality)) for t in range(first, last)}}
        for prefix, array, shift in (("d", fields, 0), ("bd", backward, 1)):
            if array is None:
                continue
            for c, axis in enumerate("xy"):
                members[f"{prefix}{axis}"] = {
                    t: Member(*encode_component(array[t - shift, c], codec), mean=float(array[t - shift, c].mean()))
                    for t in range(max(first, shift), min(last, len(array) + shift))
                }
        header = dict(class_id=None, first_frame=first, num_frames=last - first, is_last=last == len(frames))
        write_clip(file, Clip(video_id, class_name, height=height, width=width, members=members, **header))


def pack_arrays(root: Path, videos: dict, codec=PER_FIELD, splits=None, videos_per_shard=3):
    """Pack {video id: (frames, fields) or (frames, fields, backward)} as a data set; the class is the first folder."""
    root.mkdir(parents=True)
    shards = []
    ids = list(videos)
    for number, start in enumerate(range(0, len(ids), videos_per_shard)):
        fragment = root / "fragment"
        with open(fragment, "wb") as file:
            for video_id in ids[start : start + videos_per_shard]:
                frames, fields, *backward = videos[video_id]
                write_video(file, video_id, video_id.split("/")[0], frames, fields, codec, *backward)
        num_bytes, sha256 = commit_shard([fragment], root / shard_name(number))
        fragment.unlink()
        shards.append({"name": shard_name(number), "bytes": num_bytes, "sha256": sha256})
    build_index(root)
    metadata = {
        "format_version": FORMAT_VERSION,
        "name": "arrays",
        "codec": codec.metadata(),
        "classes": load_index(root)[0]["classes"],
        "num_videos": len(videos),
        "shards": shards,
    }
    write_json(root / "dataset.json", metadata)
    (root / "splits").mkdir()
    for name, members in (splits or {"split1_train": ids, "split1_test": ids}).items():
        write_bytes(root / "splits" / f"{name}.txt", "".join(f"{video_id}\n" for video_id in members).encode())
    return root


#: num_frames, height, width: more than a clip, two clips exactly, shorter than most stacks, and different sizes.
VIDEOS = {
    "run/long": (70, 64, 85),
    "run/two_clips": (65, 64, 96),
    "walk/wide": (20, 64, 113),
    "walk/tall": (16, 90, 64),
    "walk/short": (4, 64, 85),
    "sit/[strange] name! #1+": (12, 64, 85),
}


@pytest.fixture(scope="session")
def arrays():
    """{video id: (frames, fields, backward fields)} of the sizes in VIDEOS."""
    rng = np.random.default_rng(7)
    videos = {video_id: random_video(rng, *shape) for video_id, shape in VIDEOS.items()}
    return {video_id: (*videos[video_id], random_video(rng, *shape)[1]) for video_id, shape in VIDEOS.items()}


@pytest.fixture(scope="session")
def packed(tmp_path_factory, arrays):
    """Folder of a packed set of `arrays`. Not to be changed."""
    return pack_arrays(tmp_path_factory.mktemp("packed") / "set", arrays)


@pytest.fixture(scope="session")
def packed_demo(tmp_path_factory):
    """Folder of a small packed demo set: 6 classes, a few clips each. Not to be changed."""
    from flow import demo, pack

    folder = tmp_path_factory.mktemp("demo")
    demo.generate(folder / "videos", num_train=3, num_test=2, num_frames=14)
    assert pack.main([
        "--videos", str(folder / "videos"), "--splits", str(folder / "videos" / "splits"), "--dataset", "ucf101",
        "--size", "48", "--out", str(folder / "packed"),
    ]) == 0  # fmt: skip
    return folder / "packed"


class InThisProcess:
    """In the place of a pool of processes, which each take longer to start than all that they do here."""

    def __init__(self, num_workers):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def start(self, function, task):
        done = Future()
        done.set_result(function(task))
        return done


@pytest.fixture(scope="session")
def real_data():
    """Folder of real clips, named by the environment variable TWOSTREAM_DATA; skipped without it."""
    folder = os.environ.get("TWOSTREAM_DATA")
    if not folder:
        pytest.skip("TWOSTREAM_DATA names no folder of real clips")
    return Path(folder)


def pytest_runtest_setup(item):
    """Tests marked gpu need a GPU; REQUIRE_GPU=1 makes its absence a failure."""
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            if os.environ.get("REQUIRE_GPU") == "1":
                pytest.fail("REQUIRE_GPU=1, but torch finds no GPU")
            pytest.skip("needs a GPU")
