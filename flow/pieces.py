"""Parts of one video as small packed sets: what a net is to see of a video that is in no data set.

    video      0 1 2 3 4 5 6 7 8 9 ...                      the frames of a video of any length, read once
    windows        [2 3 4]   [7 8 9]     [3 4 5]            that samples need, each a range of frames
    pieces         [2 3 4 5]   [7 8 9]                      windows that overlap share a piece; a long one is cut, so
                                                            that of a video of hours a bounded part is on the disk
    packed     piece/000000, piece/000001                   a piece is a video of its own, its frame 0 the piece's first

Frames are resized, flow is computed and both are encoded as in a pack: of the same video the bytes are the same.
"""

from __future__ import annotations

import shutil
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, BinaryIO

from flow.fragment import Recipe, Totals, fragment_file, reason, write_frames
from flow.index import build_index, load_index
from flow.shard import FORMAT_VERSION, commit_shard, shard_name, write_json
from flow.video import Frame, import_cv2

#: Longest piece, and most frames that are packed at a time: some 40 MB at 256 px.
MAX_FRAMES = 1024

Window = tuple[int, int]


@dataclass(frozen=True)
class Piece:
    """Frames [start, stop) of a video."""

    start: int
    stop: int


def cut_pieces(windows: Iterable[Window], max_frames: int = MAX_FRAMES) -> tuple[list[Piece], dict[Window, int]]:
    """Pieces, in the order of their starts, that hold every window [start, stop) whole and no other frame; and which
    piece holds it.

        [0, 3), [2, 5), [5, 8)     pieces [0, 5), [5, 8)     windows that only touch share no field

    A piece has at most max_frames, unless a window alone has more.
    """
    pieces: list[Piece] = []
    holder: dict[Window, int] = {}
    for start, stop in sorted(set(windows)):
        last = pieces[-1] if pieces else Piece(0, 0)
        if pieces and start < last.stop and (stop <= last.stop or stop - last.start <= max_frames):
            pieces[-1] = Piece(last.start, max(stop, last.stop))
        else:
            pieces.append(Piece(start, stop))
        holder[start, stop] = len(pieces) - 1
    return pieces, holder


def group_pieces(pieces: Sequence[Piece], max_frames: int = MAX_FRAMES) -> Iterator[range]:
    """Numbers of the pieces that are packed together: one after the other, as many as have max_frames in all."""
    first, num_frames = 0, 0
    for number, piece in enumerate(pieces):
        length = piece.stop - piece.start
        if number > first and num_frames + length > max_frames:
            yield range(first, number)
            first, num_frames = number, 0
        num_frames += length
    yield range(first, len(pieces))


def piece_id(number: int) -> str:
    """Video id of a piece in its packed set."""
    return f"piece/{number:06d}"


def pack_pieces(
    frames: Iterator[Frame],
    pieces: Sequence[Piece],
    recipe: Recipe,
    flow: dict[str, Any] | None,
    folder: Path,
    max_frames: int = MAX_FRAMES,
) -> Iterator[range]:
    """Pack the pieces of a video, group by group: at each group's turn `folder` is a packed set of it, and of no other.

    Args:
        frames: of the video (H, W, 3) uint8, from frame 0 on; no more are taken than pieces need.
        flow: how the fields are computed, for the set's description.
    Yields the numbers of a group's pieces. Raises ValueError if a frame, or its field, cannot be encoded.
    """
    parts = _take(frames, pieces)
    for group in group_pieces(pieces, max_frames):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        fragment, totals = folder / "fragment", Totals()
        with fragment_file(fragment) as file:
            for number, part in zip(group, parts, strict=False):
                totals.add(_write_piece(part, recipe, number, file))
        num_bytes, digest = commit_shard([fragment], folder / shard_name(0))
        fragment.unlink()
        build_index(folder)
        dataset = {
            "format_version": FORMAT_VERSION,
            "flow": flow,
            "codec": recipe.codec.metadata(),
            "size_px": recipe.size_px,
            "classes": load_index(folder)[0]["classes"],
            "num_videos": totals.num_videos,
            "shards": [{"name": shard_name(0), "bytes": num_bytes, "sha256": digest}],
        }
        write_json(folder / "dataset.json", dataset)
        yield group


def _write_piece(frames: Iterator[Frame], recipe: Recipe, number: int, file: BinaryIO) -> Totals:
    try:
        return write_frames(frames, recipe, piece_id(number), "video", None, file)
    except import_cv2().error as error:  # as in a pack, OpenCV's complaint is the video's fault
        raise ValueError(reason(error)) from None


def _take(frames: Iterator[Frame], pieces: Sequence[Piece]) -> Iterator[Iterator[Frame]]:
    """Frames of each piece, to be used up before the next piece is asked for."""
    overlap = max((a.stop - b.start for a, b in zip(pieces, pieces[1:], strict=False)), default=0)
    recent: deque[Frame] = deque(maxlen=max(overlap, 1))  # what the next piece may begin with

    def read(count: int) -> Iterator[Frame]:
        for frame in islice(frames, count):
            recent.append(frame)
            yield frame

    at = 0
    for piece in pieces:
        for _ in read(piece.start - at if piece.start > at else 0):
            pass
        again = list(recent)[len(recent) - max(0, at - piece.start) :] if piece.start < at else []
        yield chain(again, read(piece.stop - max(at, piece.start)))
        at = max(at, piece.stop)
