"""Reading: the right bytes, in one read a run and clip, whatever the number of threads and open shards."""

import os
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from flow.clips import read_member
from flow.codec import MAX_SCANS, Codec, encode_component, frame_header
from flow.index import take_entries
from flow.shard import CLIP_FRAMES
from flow.video import import_cv2
from loaders import source as source_module
from loaders.batch import StreamSpec
from loaders.draw import draw_batch, population
from loaders.index import open_index
from loaders.source import SampleError, Source
from tests.conftest import pack_arrays

SPECS = [
    StreamSpec(stream="spatial", crop_px=56),
    StreamSpec(stream="temporal", L=10, crop_px=56),
    StreamSpec(stream="temporal", L=10, crop_px=56, bidirectional=True),
    StreamSpec(stream="spatial", crop_px=56, rgb_frames=11),
]


@pytest.fixture
def index(packed):
    return open_index(packed)


def drawn(index, spec, step=0, batch_size=32):
    draw = draw_batch(0, step, population(index, index.split("split1_train"), spec), spec, batch_size)
    return draw.video, draw.tau, spec.steps


def members(index, spec, video, taus, steps):
    """The same bytes, each member read for itself."""
    for row, tau in zip(video.tolist(), taus.tolist(), strict=True):
        parts = [(spec.kinds, range(tau, tau + steps))]
        if spec.bidirectional:
            parts = [(("dx", "dy"), range(tau, tau + steps // 2)), (("bdx", "bdy"), range(tau, tau - steps // 2, -1))]
        for kind, frame in ((kind, frame) for kinds, frames in parts for frame in frames for kind in kinds):
            (entry,) = take_entries(index.entries[kind], kind, index.first_row[row : row + 1] + frame)
            shard = index.root / index.shards[index.shard[row]]
            yield read_member(shard, entry, kind)


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: f"{s.stream}{s.steps}{'bi' * s.bidirectional}")
def test_what_is_read_is_what_was_packed(index, spec):
    """Also into a buffer that holds another batch's bytes, and to many threads at a time."""
    source = Source(index, spec)
    batches = [drawn(index, spec, step) for step in range(12)]
    expected = [list(members(index, spec, *run)) for run in batches]

    def images(run):
        encoded = source.read(*run)
        found = [image.tobytes() for image in encoded.images()]
        source.release(encoded)
        return found

    with ThreadPoolExecutor(6) as threads:
        assert list(threads.map(images, batches)) == expected
    source.close()


def test_few_open_shards_are_enough(index, monkeypatch):
    monkeypatch.setattr(source_module, "_MAX_OPEN_SHARDS", 1)
    assert len(index.shards) == 2
    before = len(os.listdir("/proc/self/fd"))
    source = Source(index, SPECS[1])
    run = drawn(index, SPECS[1])
    assert [image.tobytes() for image in source.read(*run).images()] == list(members(index, SPECS[1], *run))
    assert len(os.listdir("/proc/self/fd")) == before + 1
    source.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_stack_costs_one_read_and_one_more_across_a_clips_border(index, monkeypatch):
    reads = Counter()

    def preadv(file, buffers, offset):
        reads[offset] += 1
        return os_preadv(file, buffers, offset)

    os_preadv = os.preadv
    monkeypatch.setattr(source_module.os, "preadv", preadv)
    spec = SPECS[1]
    (row,) = index.rows(["run/long"])  # 70 frames: clips of 64 and 6
    source = Source(index, spec)
    for tau, expected in ((0, 1), (CLIP_FRAMES - 10, 1), (CLIP_FRAMES - 9, 2), (59, 2)):
        reads.clear()
        source.read(np.array([row]), np.array([tau]), 10)
        assert sum(reads.values()) == expected
    source.close()
    reads.clear()
    source = Source(index, SPECS[2])
    for tau, expected in ((5, 2), (CLIP_FRAMES - 5, 2), (CLIP_FRAMES - 3, 3), (CLIP_FRAMES + 1, 3)):
        reads.clear()
        source.read(np.array([row]), np.array([tau]), 10)
        assert sum(reads.values()) == expected  # one for each direction, though the backward fields come last one first
    source.close()


def test_a_damaged_backward_field_is_named(index):
    spec = SPECS[2]
    source = Source(index, spec)
    entries = {kind: np.array(table) for kind, table in index.entries.items()}
    (row,) = index.rows(["run/long"])
    entries["bdy"]["crc32"][index.first_row[row] + 18] ^= 1
    source._tables = [[entries[kind] for kind in kinds] for kinds in (spec.kinds, spec.backward_kinds)]
    with pytest.raises(ValueError, match=r"run/long/0000.018.bdy.jpg at offset \d+"):
        source.read(np.array([row]), np.array([20]), 10)


def test_a_short_video_repeats_its_last_fields_to_both_sides(index):
    """4 frames, tau in the middle of them: d_1 d_2 d_2 .. forward, and b_1, the only one, backward."""
    source = Source(index, SPECS[2])
    (row,) = index.rows(["walk/short"])
    assert source.frames(np.array([row]), np.array([1]), 10).tolist() == [[1, 2, 2, 2, 2, 1, 1, 1, 1, 1]]
    images = source.read(np.array([row]), np.array([1]), 10).images()
    assert len({image.tobytes() for image in images}) == 6  # d_1, d_2 and b_1, two components each


def test_a_set_without_backward_fields_is_refused(tmp_path):
    videos = {"a/b": (np.zeros((12, 64, 64, 3), np.uint8), np.ones((11, 2, 64, 64), np.float32))}
    index = open_index(pack_arrays(tmp_path / "set", videos))
    with pytest.raises(ValueError, match="holds no bdx, bdy members.*pack the videos again with --backward"):
        Source(index, SPECS[2])


def test_an_index_that_claims_a_giant_is_refused_before_memory_is_taken(index):
    spec = SPECS[1]
    source = Source(index, spec)
    entries = {kind: np.array(table) for kind, table in index.entries.items()}
    (row,) = index.rows(["run/long"])
    entries["dy"]["size"][index.first_row[row] + 3] = 4_000_000_000
    source._tables = [[entries[kind] for kind in spec.kinds], []]
    with pytest.raises(ValueError, match=r"0000.003.dy.jpg at offset \d+: 4000000000 bytes by the index, a JPEG"):
        source.read(np.array([row]), np.array([0]), 10)


@pytest.mark.parametrize("key", ["lo", "hi", "mean"])
def test_a_changed_range_or_mean_is_found(index, key):
    """Nothing else would show it: the JPEG is sound, and the values would be wrong."""
    spec = SPECS[1]
    (row,) = index.rows(["run/long"])
    none = "its range or mean in the index is none of a field"
    for value, message in ((0.25, "damaged, .* with CRC-32"), (np.nan, none), (np.inf, none), (-np.inf, none)):
        source = Source(index, spec)
        entries = {kind: np.array(table) for kind, table in index.entries.items()}
        entries["dx"][key][index.first_row[row] + 2] += value
        source._tables = [[entries[kind] for kind in spec.kinds], []]
        source.read(np.array([row]), np.array([3]), 10)
        with pytest.raises(SampleError, match=rf"0000.002.dx.jpg at offset \d+: .*{message}") as caught:
            source.read(np.array([row, row]), np.array([3, 0]), 10)
        assert caught.value.runs == (1,)


def test_an_entry_in_the_place_of_another_is_found(index):
    """Its member, range and CRC-32 are all sound, and another frame's or component's."""
    spec = SPECS[1]
    (row,) = index.rows(["run/long"])
    first = int(index.first_row[row])
    for kind, source_kind, frame in (("dx", "dx", 5), ("dx", "dy", 4)):
        source = Source(index, spec)
        entries = {name: np.array(table) for name, table in index.entries.items()}
        entries[kind][first + 4] = index.entries[source_kind][first + frame]
        source._tables = [[entries[name] for name in spec.kinds], []]
        with pytest.raises(SampleError, match=r"run/long/0000.004.dx.jpg at offset \d+: damaged"):
            source.read(np.array([row]), np.array([0]), 10)


def test_a_member_that_the_index_calls_empty_is_refused(index):
    """Its CRC-32 is sound, in its place in the buffer begins a good image of the batch before, and the bytes
    in front of it are the end of the longest image."""
    spec = SPECS[1]
    source = Source(index, spec)
    rows, first = index.rows(["run/long"]), np.array([0])
    encoded = source.read(rows, first, 10)
    source.release(encoded)
    step, kind = divmod(int(encoded.sizes[:-1].argmax()) + 1, 2)
    assert encoded.sizes[:-1].max() == encoded.sizes.max()
    entries = {name: np.array(index.entries[name]) for name in spec.kinds}
    empty = entries[spec.kinds[kind]][index.first_row[rows[0]] + step : index.first_row[rows[0]] + step + 1]
    ranges, jpeg = empty.tobytes()[-12:], encoded.images()[2 * step + kind].tobytes()
    empty["size"] = 0
    empty["crc32"] ^= zlib.crc32(ranges, zlib.crc32(jpeg)) ^ zlib.crc32(ranges)
    source._tables = [[entries[name] for name in spec.kinds], []]
    with pytest.raises(ValueError, match=rf"00{step}.{spec.kinds[kind]}.jpg at offset \d+: 0 bytes by the index"):
        source.read(rows, first, 10)


def test_scans_are_counted_in_every_image_that_has_more_than_one(tmp_path):
    """A progressive image of few scans begins with the header that one of thousands may have."""
    image = (np.random.default_rng(0).random((64, 64)) * 255).astype(np.uint8)
    cv2 = import_cv2()
    _, plain = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_PROGRESSIVE, 1])
    jpeg = plain.tobytes()
    assert not frame_header(jpeg).is_alone
    last = jpeg.rindex(b"\xff\xda")
    bomb = jpeg[:-2] + jpeg[last:-2] * MAX_SCANS + jpeg[-2:]
    videos = {"a/b": (np.zeros((12, 64, 64, 3), np.uint8), np.ones((11, 2, 64, 64), np.float32))}
    source = Source(open_index(pack_arrays(tmp_path / "set", videos)), StreamSpec(stream="temporal", L=1, crop_px=56))
    assert source._wrong_size(memoryview(jpeg), (64, 64, 1)) == ""
    assert f"a JPEG of {bomb.count(bytes([0xFF, 0xDA]))} scans" in source._wrong_size(memoryview(bomb), (64, 64, 1))
    assert source._headers == {}
    baseline = encode_component(image.astype(np.float32), Codec()).jpeg
    assert source._wrong_size(memoryview(baseline), (64, 64, 1)) == ""
    assert baseline.startswith(source._headers[64, 64, 1])
