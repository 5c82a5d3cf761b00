"""flow.video: what is read is what was written, and nothing damaged passes for whole."""

import csv
import struct
import sys

import numpy as np
import pytest

from flow.video import VideoError, import_cv2, read_frames, resize, to_grey, write_video


def moving_frames(num_frames=8, height=96, width=128, seed=0):
    """Smooth coloured noise that moves 2 px/frame to the right: RGB frames that JPEG keeps well."""
    cv2 = import_cv2()
    noise = np.random.default_rng(seed).integers(0, 256, (height // 8, width // 8, 3)).astype(np.uint8)
    image = cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC)
    return [np.roll(image, 2 * t, axis=1) for t in range(num_frames)]


@pytest.fixture()
def video(tmp_path):
    path = tmp_path / "clip.avi"
    write_video(path, moving_frames())
    return path


def jpeg_chunks(content):
    """(offset, size) of the JPEGs in a Motion JPEG AVI."""
    at, chunks = content.index(b"movi") + 4, []
    while content[at : at + 4] == b"00dc":
        size = struct.unpack("<I", content[at + 4 : at + 8])[0]
        chunks.append((at + 8, size))
        at += 8 + size + size % 2
    return chunks


def replace_frame(path, number, jpeg):
    content = bytearray(path.read_bytes())
    at, size = jpeg_chunks(content)[number]
    content[at : at + size] = jpeg.ljust(size, b"\0")
    path.write_bytes(content)


def test_frames_come_back_in_order_and_rgb(video):
    frames = list(read_frames(video))
    assert len(frames) == 8
    for frame, written in zip(frames, moving_frames(), strict=True):
        assert frame.dtype == np.uint8
        error, swapped = (np.abs(frame.astype(int) - other).mean() for other in (written, written[:, :, ::-1]))
        assert error < 10 and swapped > 2 * error  # chroma is stored at half the size


def test_frames_are_streamed(video):
    frames = read_frames(video, 48)
    assert iter(frames) is frames and next(frames).shape == (48, 64, 3)


@pytest.mark.parametrize(
    ("size", "size_px", "expected"),
    [((240, 320), 256, (256, 341)), ((240, 560), 256, (256, 597)), ((320, 240), 99, (132, 99)), ((9, 9), 30, (30, 30))],
)
def test_the_smaller_side_is_resized_and_the_aspect_kept(size, size_px, expected):
    assert resize(np.zeros((*size, 3), np.uint8), size_px).shape == (*expected, 3)
    assert resize(np.zeros(size, np.uint8), size_px).shape == expected


def test_a_frame_of_the_right_size_is_not_touched():
    frame = moving_frames(1)[0]
    assert resize(frame, 96) is frame


@pytest.mark.parametrize("size_px", [48, 70, 130])
def test_resize_commutes_with_mirroring(size_px):
    frame = moving_frames(1)[0]
    difference = resize(frame, size_px)[:, ::-1].astype(int) - resize(frame[:, ::-1].copy(), size_px)
    assert np.abs(difference).max() <= 1


def test_grey_is_luma():
    frame = np.array([[[100, 0, 0], [0, 100, 0], [0, 0, 100]]], np.uint8)
    assert to_grey(frame).tolist() == [[30, 59, 11]]


def test_what_is_no_video_cannot_be_opened(tmp_path):
    for name, content in (("empty.avi", b""), ("text.mp4", b"no video at all " * 99)):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(VideoError, match="cannot be opened"):
            list(read_frames(tmp_path / name))
    with pytest.raises(VideoError, match="cannot be opened: No such file"):
        list(read_frames(tmp_path / "absent.avi"))


def test_one_frame_is_too_few(tmp_path):
    write_video(tmp_path / "one.avi", moving_frames(1))
    with pytest.raises(VideoError, match="has 1 frame"):
        list(read_frames(tmp_path / "one.avi"))


@pytest.mark.parametrize("share", [0.3, 0.7, 0.999])
def test_a_truncated_avi_is_noticed(video, share):
    content = video.read_bytes()
    video.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(VideoError, match=f"truncated.*claims {len(content)}"):
        list(read_frames(video))


def test_a_truncated_mp4_is_noticed_in_its_boxes(tmp_path):
    boxes = struct.pack(">I4s8x", 16, b"ftyp") + struct.pack(">I4sQ", 1, b"mdat", 1000)
    path = tmp_path / "clip.mp4"
    path.write_bytes(boxes + bytes(500))
    with pytest.raises(VideoError, match="has 532 bytes, its container claims 1016"):
        list(read_frames(path))
    path.write_bytes(boxes + bytes(984))  # whole: FFmpeg has the last word
    with pytest.raises(VideoError, match="cannot be opened"):
        list(read_frames(path))


def test_bytes_behind_the_container_do_no_harm(video):
    video.write_bytes(video.read_bytes() + b"JUNK of some camera")
    assert len(list(read_frames(video))) == 8


def test_a_change_of_size_is_noticed(video):
    small = import_cv2().imencode(".jpg", np.full((48, 64, 3), 90, np.uint8))[1].tobytes()
    replace_frame(video, 5, small)
    with pytest.raises(VideoError, match="changes size from 128x96 to 64x48 px at packet 5"):
        list(read_frames(video))


def test_an_undecodable_frame_is_noticed_and_not_the_end(video):
    replace_frame(video, 4, b"")
    with pytest.raises(VideoError, match="is damaged: .*4 (frames could|cannot)|is damaged: frame 4"):
        list(read_frames(video))


def test_the_header_may_claim_any_number_of_frames(video):
    content = bytearray(video.read_bytes())
    at = content.index(b"avih") + 8 + 16
    assert struct.unpack_from("<I", content, at)[0] == 8
    struct.pack_into("<I", content, at, 500)
    video.write_bytes(content)
    assert len(list(read_frames(video))) == 8


def test_the_writer_refuses_what_it_cannot_write(tmp_path):
    with pytest.raises(VideoError, match="at least one frame"):
        write_video(tmp_path / "none.avi", [])
    with pytest.raises(VideoError, match="cannot be written"):
        write_video(tmp_path / "absent" / "clip.avi", moving_frames(2))
    with pytest.raises(VideoError, match=r"shape \(48, 128, 3\) after"):
        write_video(tmp_path / "two.avi", [*moving_frames(1), *moving_frames(1, height=48)])


def test_a_missing_system_library_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(ImportError, match="libgl1 libxcb1 libglib2.0-0"):
        import_cv2()


def test_real_clips_are_whole_and_counted_by_decoding(real_data):
    """Their headers claim up to eight frames more, or fewer; packets, chunks and trailing bytes vary."""
    for name in ("hmdb51_mini", "ucf101_extra", "jhmdb_mini", "ucf101_mini"):
        with open(real_data / name / "clips.csv", newline="") as file:
            for row in list(csv.DictReader(file))[:: 1 if name == "hmdb51_mini" else 12]:
                frames = list(read_frames(real_data / name / "videos" / row["path"]))
                assert len(frames) == int(row["frames_decoded"])
                assert frames[0].shape == (int(row["height"]), int(row["width"]), 3)


def test_a_cut_and_a_hole_in_a_real_clip_are_noticed(real_data, tmp_path):
    content = bytearray(sorted((real_data / "ucf101_mini/videos").glob("*/*.avi"))[0].read_bytes())
    middle = len(content) // 2
    (tmp_path / "cut.avi").write_bytes(content[:middle])
    with pytest.raises(VideoError, match="truncated"):
        list(read_frames(tmp_path / "cut.avi"))
    content[middle : middle + 20000] = np.random.default_rng(0).bytes(20000)
    (tmp_path / "hole.avi").write_bytes(content)
    with pytest.raises(VideoError, match="damaged"):
        list(read_frames(tmp_path / "hole.avi"))
