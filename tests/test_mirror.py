"""The mirror property through the whole pipeline: flow of the mirrored video, packed and loaded without mirror, equals
flow of the video loaded with mirror. On a generated video with a known motion, and on real clips."""

from itertools import islice

import numpy as np
import pytest

from flow import pack
from flow.demo import draw_texture, shift
from flow.video import read_frames, write_video
from loaders import dali_loader
from loaders.batch import FLOW_SCALE, StreamSpec
from loaders.dali_loader import DaliLoader
from loaders.draw import Draw
from loaders.index import open_index
from loaders.pipeline import Graph
from loaders.source import Source
from loaders.views import VIEWS

L = 4


def pack_both(folder, videos):
    """Pack {name: frames} twice, as they are and mirrored; the two indexes."""
    indexes = []
    for side, step in (("plain", 1), ("mirrored", -1)):
        for name, frames in videos.items():
            (folder / side / "class").mkdir(parents=True, exist_ok=True)
            write_video(folder / side / "class" / f"{name}.avi", [np.ascontiguousarray(f[:, ::step]) for f in frames])
        out = folder / f"packed_{side}"
        assert pack.main(["--videos", str(folder / side), "--out", str(out), "--size", "128"]) == 0
        indexes.append(open_index(out))
    return indexes


def train_batch(index, spec, tau, crop, mirror):
    """Samples of every video of the set at the given draws, through the training graph, in px/frame."""
    n = index.num_videos
    draw = Draw.of_stacks(np.arange(n), np.full(n, tau), np.asarray(crop), np.full(n, mirror))
    with DaliLoader(Source(index, spec), iter([draw]), Graph(), n) as loader:
        return next(loader).inputs.numpy() / FLOW_SCALE


def check(found, expected):
    """Agree within the flow method's error, which leaving out the negation of dx must at least quintuple.

    found, expected (n, 2L, h, w). The error is the mean distance of dx, the component whose sign is at stake.
    """
    found, expected = found[:, 0::2], expected[:, 0::2]
    error, without_negation = np.abs(found - expected).mean(), np.abs(-found - expected).mean()
    assert without_negation > 5 * error, f"{without_negation:.3f} px without negation, {error:.3f} px with"
    assert error < 0.25


def check_property(plain, mirrored, subtract_mean):
    spec = StreamSpec(stream="temporal", L=L, crop_px=112, subtract_mean=subtract_mean)
    widths = plain.widths
    x0 = np.array([3, 17, 5, 30, 11, 9])[: plain.num_videos]
    crops = [np.stack([np.full(len(x0), 7), x], axis=1) for x in (x0, widths - 112 - x0)]
    found = train_batch(plain, spec, 2, crops[0], True)
    check(found, train_batch(mirrored, spec, 2, crops[1], False))

    rows = np.arange(plain.num_videos)
    views = [
        [batch.inputs.numpy() / FLOW_SCALE for batch in loader]
        for loader in (
            dali_loader.view_loader(index, rows, spec, num_taus=1, batch_size=len(rows)) for index in (plain, mirrored)
        )
    ]
    for k, (y, x, mirror) in enumerate(VIEWS):
        # the right corner of the video is the left corner of the mirrored one; the centre may be off by a pixel
        other = VIEWS.index((y, 1 - x, not mirror))
        check(views[0][k], views[1][other])


def test_on_a_generated_video_with_a_known_motion(tmp_path):
    """A texture that moves 2.5 px to the right and 1 px down: the field is known in closed form."""
    texture = draw_texture(np.random.default_rng(0), 172, 128)
    frames = [
        np.repeat(shift(texture, 2.5 * t, t, 172, 128, wrap=True)[:, :, None], 3, axis=2).clip(0, 255).astype(np.uint8)
        for t in range(8)
    ]
    plain, mirrored = pack_both(tmp_path, {"known": frames})
    check_property(plain, mirrored, subtract_mean=False)
    spec = StreamSpec(stream="temporal", L=L, crop_px=112, subtract_mean=False)
    for index, mirror, dx in ((plain, False, 2.5), (plain, True, -2.5), (mirrored, False, -2.5), (mirrored, True, 2.5)):
        stack = train_batch(index, spec, 1, [[8, 30]], mirror)[0]
        assert np.abs(np.median(stack[0::2]) - dx) < 0.15
        assert np.abs(np.median(stack[1::2]) - 1) < 0.15


@pytest.mark.parametrize("subtract_mean", [False, True])
def test_on_real_clips(real_data, tmp_path, subtract_mean):
    folder = real_data / "ucf101_mini" / "videos"
    clips = {}
    for class_name in ("HorseRace", "BasketballDunk", "Surfing", "Archery"):
        path = sorted((folder / class_name).glob("*.avi"))[0]
        clips[path.stem] = list(islice(read_frames(path), 10, 20))
    plain, mirrored = pack_both(tmp_path, clips)
    check_property(plain, mirrored, subtract_mean)
