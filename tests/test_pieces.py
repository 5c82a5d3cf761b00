"""Pieces of a video: every window whole in one, no frame that none needs, and the bytes of a pack."""

from dataclasses import replace

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from flow import demo, pack
from flow.codec import Codec
from flow.fragment import Recipe
from flow.pieces import Piece, cut_pieces, group_pieces, pack_pieces, piece_id
from flow.shard import shard_name
from flow.video import read_frames
from loaders.index import open_index

WINDOWS = st.lists(
    st.tuples(st.integers(0, 200), st.integers(1, 12)).map(lambda window: (window[0], sum(window))), min_size=1
)


RECIPE = Recipe(size_px=48, method="dis", codec=Codec())


@given(WINDOWS, st.integers(12, 60))
def test_every_window_is_whole_in_its_piece(windows, max_frames):
    pieces, holder = cut_pieces(windows, max_frames)
    for window in windows:
        piece = pieces[holder[window]]
        assert piece.start <= window[0] and window[1] <= piece.stop
    needed = {frame for window in windows for frame in range(*window)}
    assert {frame for piece in pieces for frame in range(piece.start, piece.stop)} == needed
    assert all(piece.stop - piece.start <= max_frames for piece in pieces)
    assert [piece.start for piece in pieces] == sorted({piece.start for piece in pieces})


@given(WINDOWS, st.integers(12, 60))
def test_groups_are_all_pieces_once_and_bounded(windows, max_frames):
    pieces, _ = cut_pieces(windows, max_frames)
    groups = list(group_pieces(pieces, max_frames))
    assert [number for group in groups for number in group] == list(range(len(pieces)))
    assert all(sum(pieces[n].stop - pieces[n].start for n in group) <= max_frames for group in groups)


def test_windows_that_only_touch_are_apart():
    assert cut_pieces([(5, 8), (0, 3), (2, 5)])[0] == [Piece(0, 5), Piece(5, 8)]


def test_the_bytes_are_those_of_a_pack(tmp_path):
    """A whole video as one piece is what flow.pack writes; a later piece has the same images from its start on."""
    demo.generate(tmp_path / "videos", num_train=1, num_test=1, num_frames=14)
    assert pack.main(["--videos", str(tmp_path / "videos"), "--size", "48", "--out", str(tmp_path / "packed")]) == 0
    packed = open_index(tmp_path / "packed")
    video = next((tmp_path / "videos").rglob("*.avi"))
    (row,) = packed.rows([f"{video.parent.name}/{video.stem}"])
    for pieces in ([Piece(0, 14)], [Piece(0, 9), Piece(3, 11), Piece(8, 14)]):  # what overlaps is read once
        num_found = 0
        for group in pack_pieces(read_frames(video, 48), pieces, RECIPE, None, tmp_path / "set", max_frames=17):
            index = open_index(tmp_path / "set")
            assert index.video_ids(range(index.num_videos)) == [piece_id(number) for number in group]
            for position, number in enumerate(group):
                piece, num_found = pieces[number], num_found + 1
                for kind, table in packed.entries.items():
                    num = piece.stop - piece.start - (kind != "rgb")  # no field begins at a piece's last frame
                    ours = index.entries[kind][index.first_row[position] + np.arange(num)]
                    there = table[packed.first_row[row] + piece.start + np.arange(num)]
                    for key in ("size", "lo", "hi", "mean") if kind != "rgb" else ("size",):
                        assert ours[key].tolist() == there[key].tolist(), (number, kind, key)
                    for mine, packs in zip(ours, there, strict=True):
                        assert read_member(tmp_path / "set", 0, mine) == read_member(
                            tmp_path / "packed", packed.shard[row], packs
                        )
        assert num_found == len(pieces)


def read_member(root, shard, entry):
    return (root / shard_name(shard)).read_bytes()[entry["offset"] : entry["offset"] + entry["size"]]


def test_frames_alone_have_no_fields(tmp_path):
    frames = iter(np.random.default_rng(0).integers(0, 255, (5, 48, 64, 3)).astype(np.uint8))
    list(pack_pieces(frames, [Piece(1, 3)], replace(RECIPE, method=None), None, tmp_path / "set"))
    index = open_index(tmp_path / "set")
    assert list(index.entries) == ["rgb"] and index.num_frames.tolist() == [2]
    assert next(frames) is not None  # frame 3: no more were taken than the piece needs
