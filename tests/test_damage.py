"""Damaged shards in batches large enough to end the process if the decoder ever saw them: always an error that names
shard, member and offset, and never a wrong tensor."""

import re
import shutil
import zlib

import numpy as np
import pytest
import torch

from flow.codec import Codec, encode_component, encode_rgb
from flow.index import build_index
from flow.shard import RGB_ENTRY, ShardError
from loaders import dali_loader
from loaders.batch import StreamSpec
from loaders.draw import draw_batch, population
from loaders.index import open_index
from loaders.pipeline import Graph
from tests.conftest import pack_arrays

SPEC = StreamSpec(stream="temporal", L=10, crop_px=56)
WINDOWS = StreamSpec(stream="temporal", L=10, crop_px=56, stacks_per_window=4)
RGB = StreamSpec(stream="spatial", crop_px=56)
NUM_JPEGS = 1280


@pytest.fixture
def copy(packed, tmp_path):
    return shutil.copytree(packed, tmp_path / "set")


def first_member(index, kind="dx", spec=None):
    """A member that the first batch of seed 0 holds: (shard's path, offset, size)."""
    spec = spec or (RGB if kind == "rgb" else SPEC)
    batch_size = NUM_JPEGS // spec.num_images
    draw = draw_batch(0, 0, population(index, index.split("split1_train"), spec), spec, batch_size)
    row = index.first_row[draw.video[40]] + draw.tau[40]
    entry = index.entries[kind][row]
    return index.root / index.shards[index.shard[draw.video[40]]], int(entry["offset"]), int(entry["size"])


def overwrite(path, offset, content):
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(content)


def load_first(root, spec=SPEC, graph=None):
    index = open_index(root)
    batch_size = NUM_JPEGS // spec.num_images
    rows = index.split("split1_train")
    with dali_loader.train_loader(index, rows, spec, seed=0, batch_size=batch_size, graph=graph) as loader:
        return next(loader)


HEADER = (0, b"\x00" * 64)
SCAN = (-200, b"\x00" * 100)
CUT = (-400, b"\x00" * 400)
SIZE = (90, b"\xff\xc0\x00\x0b\x08\xff\xff\xff\xff")


@pytest.mark.parametrize("kind", ["dx", "dy", "rgb"])
@pytest.mark.parametrize("at, content", [HEADER, SCAN, CUT, SIZE], ids=["header", "scan", "cut", "size"])
def test_damaged_bytes_are_named(copy, kind, at, content):
    path, offset, size = first_member(open_index(copy), kind)
    overwrite(path, offset + (at if at >= 0 else size + at), content)
    spec = RGB if kind == "rgb" else SPEC
    with pytest.raises(ShardError, match=rf"{path.name}: .*\.{kind}\.jpg at offset {offset}: damaged"):
        load_first(copy, spec)


@pytest.fixture
def one_shard(tmp_path, arrays):
    return pack_arrays(tmp_path / "one", arrays, videos_per_shard=100)


def replace_member(root, content, kind="dx", spec=None):
    """Put other bytes in a member's place and make the index agree, as a broken writer would have left it."""
    path, offset, size = first_member(open_index(root), kind, spec)
    overwrite(path, offset, content)
    index = root / "index.bin"
    raw = index.read_bytes()
    entry = np.zeros(1, RGB_ENTRY)  # the first half of a field's entry, too
    entry["offset"], entry["size"] = offset, size
    at = raw.index(entry.tobytes()[:12])
    entry["size"], entry["crc32"] = len(content), zlib.crc32(content)
    overwrite(index, at, entry.tobytes())
    return path, offset


@pytest.mark.parametrize("kind, spec, channels", [("dx", SPEC, 1), ("rgb", RGB, 3)])
def test_a_jpeg_of_another_size_never_reaches_the_decoder(one_shard, kind, spec, channels):
    """Its CRC is right, but the region would lie outside the image, which ends the process inside the decoder."""
    small = encode_component(np.zeros((16, 16), np.float32), Codec()).jpeg
    if kind == "rgb":
        small = encode_rgb(np.zeros((16, 16, 3), np.uint8), 90)
    path, offset = replace_member(one_shard, small, kind)
    message = rf"{path.name}: .*at offset {offset}: a JPEG of 16x16 px and {channels} channels"
    with pytest.raises(ShardError, match=message):
        load_first(one_shard, spec)


@pytest.mark.parametrize("kind, spec", [("dx", SPEC), ("rgb", RGB)])
def test_a_cut_jpeg_never_reaches_the_decoder(one_shard, kind, spec):
    """Its CRC is right, but the decoder would go on reading what stands behind it."""
    path, offset, size = first_member(open_index(one_shard), kind)
    replace_member(one_shard, path.read_bytes()[offset : offset + size // 2], kind)
    with pytest.raises(ShardError, match=rf"{path.name}: .*\.{kind}\.jpg at offset {offset}: no end-of-image marker"):
        load_first(one_shard, spec)


@pytest.mark.parametrize("graph", [Graph(), Graph(decoder="shared", mixed_share=0.3)], ids=["one", "shared"])
@pytest.mark.parametrize("kind, spec", [("dx", SPEC), ("dx", WINDOWS), ("rgb", RGB)])
def test_what_the_decoder_cannot_decode_is_named(one_shard, kind, spec, graph):
    """A JPEG of a lossless process: the decoder reports it by its number in the batch; that becomes the member, or two
    where two decoders share the batch and each has its own numbers.
    """
    path, offset, size = first_member(open_index(one_shard), kind, spec)
    jpeg = path.read_bytes()[offset : offset + size]
    replace_member(one_shard, jpeg.replace(b"\xff\xc0", b"\xff\xc3", 1), kind, spec)
    with pytest.raises(ShardError, match="no decodable JPEG") as caught:
        load_first(one_shard, spec, graph)
    places = str(caught.value).split(": no decodable")[0].split(" or ")
    assert len(places) == (1 if graph.decoder == "cpu" else 2)
    assert any(re.fullmatch(rf"{path.name}: .*\.{kind}\.jpg at offset {offset}", place) for place in places)


def test_after_errors_a_new_loader_gives_the_same_step(copy, packed):
    path, offset, size = first_member(open_index(copy))
    good = path.read_bytes()[offset : offset + size]
    overwrite(path, offset, bytes(32))
    for _ in range(3):
        with pytest.raises(ShardError, match="damaged"):
            load_first(copy)
    overwrite(path, offset, good)
    assert torch.equal(load_first(copy).inputs, load_first(packed).inputs)


def test_a_shard_that_is_missing_or_cut_is_named(copy):
    path = copy / "shard-000001.tar"
    content = path.read_bytes()
    path.write_bytes(content[:-5000])
    with pytest.raises(ShardError, match=rf"shard-000001.tar: {len(content) - 5000} bytes, dataset.json says"):
        open_index(copy)
    path.unlink()
    with pytest.raises(ShardError, match="shard-000001.tar: missing"):
        open_index(copy)


def test_an_index_of_other_shards_is_refused(copy, tmp_path, arrays):
    other = pack_arrays(tmp_path / "other", dict(list(arrays.items())[:2]))
    shutil.copy(other / "index.bin", copy / "index.bin")
    with pytest.raises(ShardError, match="lists other shards than dataset.json"):
        open_index(copy)
    (copy / "index.bin").write_bytes(b"2STREAM1" + bytes(100))
    with pytest.raises(ShardError, match="is damaged: .*--rebuild-index"):
        open_index(copy)
    (copy / "index.bin").unlink()
    with pytest.raises(ShardError, match="No index at"):
        open_index(copy)


@pytest.mark.parametrize("part", ["tar header", "json", "name"])
def test_a_damaged_tar_is_not_taken_for_a_short_one(copy, part):
    path = copy / "shard-000000.tar"
    content = bytearray(path.read_bytes())
    at = {"tar header": content.rfind(b"ustar") - 257 + 148, "json": 520, "name": content.rfind(b"ustar") - 257}[part]
    content[at : at + 4] = b"\xff\xfe\xfd\xfc"
    path.write_bytes(content)
    with pytest.raises(ShardError, match=r"shard-000000.tar: .*offset \d+"):
        build_index(copy)


def test_another_encoding_is_refused(copy):
    text = (copy / "dataset.json").read_text()
    (copy / "dataset.json").write_text(text.replace('"version": 1', '"version": 2'))
    with pytest.raises(ValueError, match="encoded with linear-jpeg version 2"):
        open_index(copy)
