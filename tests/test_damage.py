"""Damaged shards in batches large enough to end the process if the decoder ever saw them: always an error that names
shard, member and offset, and never a wrong tensor."""

import os
import re
import shutil
import sys
import time
import zlib

import numpy as np
import pytest
import torch

from flow.codec import Codec, encode_component, encode_rgb
from flow.index import build_index
from flow.shard import FIELD_ENTRY, RGB_ENTRY, ShardError
from loaders import dali_loader, reference
from loaders.batch import FLOW_SCALE, StreamSpec
from loaders.damage import Replacements
from loaders.draw import draw_batch, population
from loaders.index import open_index
from loaders.pipeline import Graph
from loaders.reader import Reader
from loaders.reference import ReferenceLoader
from loaders.request import requests
from loaders.source import SampleError, Source
from tests.conftest import pack_arrays

SPEC = StreamSpec(stream="temporal", L=10, crop_px=56)
TRAJECTORIES = StreamSpec(stream="temporal", L=10, crop_px=56, stacking="trajectory")
WINDOWS = StreamSpec(stream="temporal", L=10, crop_px=56, stacks_per_window=4)
RGB = StreamSpec(stream="spatial", crop_px=56)
NUM_JPEGS = 1280
SHARED = {"decoder": "shared", "mixed_share": 0.3}


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
    """Put other bytes in the place of the first member, see `replace_bytes`."""
    place = first_member(open_index(root), kind, spec)
    replace_bytes(root, kind, *place, content)
    return place[:2]


def replace_bytes(root, kind, path, offset, size, content):
    """Put other bytes in a member's place and make the index agree, as a broken writer would have left it."""
    before = path.read_bytes()[offset : offset + size]
    overwrite(path, offset, content)
    index = root / "index.bin"
    raw = index.read_bytes()
    entry = np.zeros(1, RGB_ENTRY)  # the first half of a field's entry, too
    entry["offset"], entry["size"] = offset, size
    at = raw.index(entry.tobytes()[:12])
    ranges = b"" if kind == "rgb" else raw[at + RGB_ENTRY.itemsize : at + FIELD_ENTRY.itemsize]
    entry["size"], entry["crc32"] = len(content), int.from_bytes(raw[at + 12 : at + 16], "little")
    entry["crc32"] ^= zlib.crc32(ranges, zlib.crc32(before)) ^ zlib.crc32(ranges, zlib.crc32(content))
    overwrite(index, at, entry.tobytes())


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


@pytest.mark.parametrize("graph", [Graph(), Graph(**SHARED)], ids=["one", "shared"])
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


@pytest.mark.parametrize("module", [dali_loader, reference])
@pytest.mark.parametrize("spec", [SPEC, RGB, WINDOWS, TRAJECTORIES], ids=["stacks", "rgb", "windows", "trajectories"])
def test_after_an_error_a_loader_goes_on_where_it_was(copy, packed, spec, module, capfd):
    """A member of a later step is damaged and mended: no batch is lost, doubled or changed, and the decoder, which was
    at later ones, has seen nothing but whole images."""
    num_steps, batch_size = 4, 16
    index, rows = open_index(copy), open_index(copy).split("split1_train")
    draws = [draw_batch(0, step, population(index, rows, spec), spec, batch_size) for step in range(num_steps)]
    members = [members_of(index, draw, spec) for draw in draws]
    path, offset = sorted(members[2] - members[0] - members[1])[0]
    good = path.read_bytes()
    overwrite(path, offset, bytes(32))
    with module.train_loader(open_index(packed), rows, spec, seed=0, batch_size=batch_size) as loader:
        expected = [next(loader).inputs.clone() for _ in range(num_steps)]
    found = []
    with module.train_loader(index, rows, spec, seed=0, batch_size=batch_size) as loader:
        while True:
            try:
                found.append(next(loader).inputs.clone())
            except ShardError as error:
                break_at, message = len(found), str(error)
                break
        with pytest.raises(ShardError, match=re.escape(message)):
            next(loader)
        path.write_bytes(good)
        found += [next(loader).inputs.clone() for _ in range(num_steps - len(found))]
    assert break_at <= 2 and f"{path.name}: " in message and f"at offset {offset}" in message
    for mine, other in zip(found, expected, strict=True):
        assert torch.equal(mine, other)
    assert capfd.readouterr().err == ""


def members_of(index, draw, spec, windows=False):
    """{(path, offset)} of the members that a draw's samples are made from; windows: or the windows of those."""
    first, steps = (draw.first, spec.window_steps) if windows else (draw.tau, spec.steps)
    entries = Source(index, spec).stored_entries(draw.video, first, steps)
    paths = [index.root / index.shards[shard] for shard in index.shard[draw.video]]
    return {(path, int(offset)) for path, row in zip(paths, entries["offset"], strict=True) for offset in row.flat}


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
    (copy / "index.bin").write_bytes(b"2STREAM2" + bytes(100))
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
    with pytest.raises(ValueError, match="encoded with 'linear-jpeg' version 2"):
        open_index(copy)


# --- data.on_damage=skip -----------------------------------------------------------------------------------------


def load(root, spec, num_steps=6, start_step=0, module=dali_loader, **options):
    """Batches, and how many samples were replaced."""
    index = open_index(root)
    means = {"seed": 1, "batch_size": 16, "start_step": start_step, **options}
    with module.train_loader(index, index.split("split1_train"), spec, **means) as loader:
        return [next(loader) for _ in range(start_step, num_steps)], loader.num_replaced


@pytest.mark.parametrize("spec", [SPEC, RGB, WINDOWS], ids=["stacks", "rgb", "windows"])
def test_damaged_samples_are_replaced_within_their_class(copy, packed, spec, caplog):
    """All samples that need no damaged member, also not for their window, are what they were; the others' class is."""
    index = open_index(copy)
    sound, _ = load(packed, spec)
    path, offset = sorted(members_of(index, sound[3].draw, spec))[5]
    overwrite(path, offset, bytes(32))
    found, num_replaced = load(copy, spec, on_damage="skip")
    assert num_replaced > 0
    assert "Another sample of its class takes its place" in caplog.text and f"at offset {offset}" in caplog.text
    assert_only_these_are_replaced(found, sound, index, spec, path, offset)
    assert_the_same_for_two_ranks_and_after_a_restart(found, copy, spec)


def assert_only_these_are_replaced(found, sound, index, spec, path, offset):
    """Samples differ, and are others of their class, where they, or their windows, are made from a damaged member."""
    all_differs = []
    for batch, was in zip(found, sound, strict=True):
        assert torch.equal(batch.labels, was.labels)
        assert (path, offset) not in members_of(index, batch.draw, spec, windows=True)
        differs = (batch.inputs != was.inputs).flatten(1).any(1).tolist()
        samples = [was.draw.take(slice(i, i + 1)) for i in range(len(was.draw))]
        assert differs == [(path, offset) in members_of(index, sample, spec, windows=True) for sample in samples]
        all_differs += differs
    assert any(all_differs) and not all(all_differs)


def assert_the_same_for_two_ranks_and_after_a_restart(found, root, spec, **options):
    halves = [load(root, spec, rank=rank, world_size=2, on_damage="skip", **options)[0] for rank in range(2)]
    for batch, *parts in zip(found, *halves, strict=True):
        assert torch.equal(batch.inputs, torch.cat([part.inputs for part in parts]))
    resumed, _ = load(root, spec, start_step=4, on_damage="skip", **options)
    for batch, again in zip(found[4:], resumed, strict=True):
        assert torch.equal(batch.inputs, again.inputs)


@pytest.mark.parametrize("kind, spec", [("dx", SPEC), ("rgb", RGB)])
def test_replaced_samples_are_those_of_the_reference(copy, kind, spec):
    path, offset, _ = first_member(open_index(copy), kind)
    overwrite(path, offset, bytes(32))
    ours, num_replaced = load(copy, spec, on_damage="skip", seed=0)
    others, num_others = load(copy, spec, on_damage="skip", seed=0, module=reference)
    assert num_replaced >= num_others > 0  # one reads further ahead
    for mine, other in zip(ours, others, strict=True):
        np.testing.assert_array_equal(mine.draw.video, other.draw.video)
        np.testing.assert_allclose(mine.inputs, other.inputs, atol=1e-4)


ON_GPU = pytest.param({"device": "cuda", "decoder": "mixed"}, marks=pytest.mark.gpu, id="gpu")


@pytest.mark.parametrize("options", [pytest.param({}, id="one"), pytest.param(SHARED, id="shared"), ON_GPU])
@pytest.mark.parametrize("spec", [SPEC, WINDOWS], ids=["stacks", "windows"])
def test_what_the_decoder_cannot_decode_is_replaced_too(one_shard, spec, options):
    """Found out only by the graph, when later batches are on their way: they are made again, in their order."""
    graph = Graph(**options)
    sound, _ = load(one_shard, spec, graph=graph)
    index = open_index(one_shard)
    path, offset = make_undecodable(one_shard, sound[1].draw, spec)
    found, num_replaced = load(one_shard, spec, on_damage="skip", graph=graph)
    assert num_replaced > 0
    assert_what_the_draws_say(found, index, spec, num_codes=0 if graph.device == "cpu" else 2)
    if graph.decoder == "cpu":  # of others it is not known which image they complain of: two may be replaced
        assert_only_these_are_replaced(found, sound, index, spec, path, offset)
        assert_the_same_for_two_ranks_and_after_a_restart(found, one_shard, spec, graph=graph)
    for batch, was in zip(found, sound, strict=True):
        assert torch.equal(batch.labels, was.labels)
        assert (path, offset) not in members_of(index, batch.draw, spec, windows=True)


def make_undecodable(root, draw, spec):
    """Make the first member of a draw one of a lossless process, with its CRC: (path, offset)."""
    index = open_index(root)
    path, offset = sorted(members_of(index, draw, spec))[0]
    sizes = {(int(row["offset"]), kind): int(row["size"]) for kind in spec.kinds for row in index.entries[kind]}
    kind, size = next((kind, size) for (at, kind), size in sizes.items() if at == offset)
    jpeg = path.read_bytes()[offset : offset + size].replace(b"\xff\xc0", b"\xff\xc3", 1)
    replace_bytes(root, kind, path, offset, size, jpeg)
    return path, offset


def assert_what_the_draws_say(batches, index, spec, num_codes):
    """Every sample, replaced or not, is what another loader makes of its draw, within so many codes."""
    widest_px = max(float((index.entries[kind]["hi"] - index.entries[kind]["lo"]).max()) for kind in spec.kinds)
    atol = 1e-4 + num_codes * widest_px / 255 * FLOW_SCALE
    others = ReferenceLoader(Source(index, spec), iter([batch.draw for batch in batches]), device="cpu")
    for batch, other in zip(batches, others, strict=True):
        np.testing.assert_allclose(batch.inputs.cpu(), other.inputs, atol=atol)
        assert torch.equal(batch.labels.cpu(), other.labels)


@pytest.mark.parametrize("spec", [SPEC, WINDOWS], ids=["stacks", "windows"])
def test_what_is_read_again_is_read_with_its_replacements(one_shard, spec, monkeypatch):
    """The threads that read are given all the time they want between a decoder's error and what comes after it."""
    sound, _ = load(one_shard, spec)
    make_undecodable(one_shard, sound[1].draw, spec)
    expected, num_replaced = load(one_shard, spec, on_damage="skip")
    put_back = Reader.put_back

    def slowly(self, requests):
        put_back(self, requests)
        time.sleep(0.2)

    monkeypatch.setattr(Reader, "put_back", slowly)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        found, num_found = load(one_shard, spec, on_damage="skip")
    finally:
        sys.setswitchinterval(interval)
    assert num_found == num_replaced > 0
    for batch, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(batch.draw.video, other.draw.video)
        assert torch.equal(batch.inputs, other.inputs)


def test_too_much_damage_ends_the_training(copy):
    for path in copy.glob("shard-*.tar"):
        size = path.stat().st_size
        path.write_bytes(bytes(size))
    with pytest.raises(ShardError, match=r"damaged.* more than data.max_damaged_pct=1.0"):
        load(copy, SPEC, on_damage="skip")


def test_tests_are_never_made_of_other_samples(copy):
    """A test loader has no draw to put in a damaged one's place, and takes no option that says so."""
    path, offset, _ = first_member(open_index(copy))
    overwrite(path, offset, bytes(32))
    index = open_index(copy)
    with dali_loader.view_loader(index, index.split("split1_test"), SPEC, num_taus=25, batch_size=16) as loader:
        with pytest.raises(ShardError, match=rf"{path.name}: .* at offset {offset}: damaged"):
            list(loader)
    with pytest.raises(TypeError, match="on_damage"):
        dali_loader.view_loader(index, index.split("split1_test"), SPEC, batch_size=16, on_damage="skip")


def test_a_shard_that_does_not_answer_is_named_and_waited_for_no_longer(copy):
    """A FIFO in the shard's place: opening it waits for a writer that never comes."""
    index = open_index(copy)
    for name in index.shards:
        (index.root / name).unlink()
        os.mkfifo(index.root / name)
    with dali_loader.train_loader(
        index, index.split("split1_train"), SPEC, seed=0, batch_size=16, timeout_s=0.2
    ) as loader:
        for _ in range(2):
            with pytest.raises(
                TimeoutError, match=r"Waited 0.2 s for .*shard-\d{6}.tar at offset \d+.*train.timeout_s"
            ):
                next(loader)
    for name in index.shards:  # let the threads go
        os.close(os.open(index.root / name, os.O_RDWR))


def test_a_shard_that_goes_away_is_named(copy):
    index = open_index(copy)
    for name in index.shards:
        (index.root / name).unlink()
    with pytest.raises(ShardError, match=r"shard-\d{6}.tar: .*at offset \d+: cannot be read \(No such file"):
        load_open(index)


def load_open(index):
    with dali_loader.train_loader(index, index.split("split1_train"), SPEC, seed=0, batch_size=16) as loader:
        return next(loader)


def test_two_threads_that_meet_the_same_damage_replace_it_once(packed):
    index = open_index(packed)
    videos = population(index, index.split("split1_train"), SPEC)
    replacements = Replacements(videos, SPEC, seed=0, first_slot=0, max_damaged_pct=50)
    (request,) = requests(iter([draw_batch(0, 0, videos, SPEC, 16)]), SPEC, 0, views=False)
    error = SampleError("damaged", (5,))
    replacements.draw_others(request, error)
    once = replacements.apply(request)
    replacements.draw_others(request, error)  # of the request as it was
    again = replacements.apply(request)
    assert (once.video[5], once.tau[5]) == (again.video[5], again.tau[5]) and replacements.num_replaced == 1
    replacements.draw_others(once, error)  # what takes its place is damaged too
    assert replacements.num_replaced == 2
    np.testing.assert_array_equal(np.delete(replacements.apply(request).video, 5), np.delete(request.video, 5))
