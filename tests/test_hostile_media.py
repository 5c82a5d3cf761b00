"""Lists, images and videos from strangers, to be packed: each attack ends in one of our errors, in bounded memory, and
leads to no other file. SECURITY.md has the list."""

import os
import re
import struct
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest

from flow import catalog
from flow.codec import coded_size, decode_grey, decode_rgb, encode_rgb
from flow.flow_dirs import FlowDirTask, write_flow_dir
from flow.flow_files import list_flow_dirs
from flow.image_sources import Source as ImageSource
from flow.image_sources import read_source
from flow.images import read_image
from flow.untrusted import MAX_JSON_BYTES
from flow.video import VideoError, read_frames, resize, write_video
from tests.hostile import NOT_REGULAR, bounded_memory, replace, tar_of

# --- lists -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line",
    [
        "../../etc/passwd.avi 1",
        "/etc/passwd.avi 1",
        "a/../../b.avi",
        "a/\x1b[2J.avi",
        "a/b.avi " + "9" * 5000,
        "x" * 5000,
        "a/b",
        "a/.hidden.avi",
    ],
)
def test_a_list_names_no_path_outside(tmp_path, line):
    (tmp_path / "classInd.txt").write_text("1 a\n")
    for side in ("train", "test"):
        (tmp_path / f"{side}list01.txt").write_text(f"a/good.avi 1\n{line}\n")
    with pytest.raises(ValueError, match="list01.txt, line 2"):
        catalog.read_ucf101_lists(tmp_path)
    (tmp_path / "a_test_split1.txt").write_text(f"good.avi 1\n{line}\n")
    with pytest.raises(ValueError, match="a_test_split1.txt, line 2"):
        catalog.read_hmdb51_lists(tmp_path)


def test_lists_that_are_no_text_or_too_long_are_refused(tmp_path):
    (tmp_path / "classInd.txt").write_text("1 a\n")
    for content, message in (
        (b"\xff\xfe\n", "no text in UTF-8"),
        (b"a/b.avi 1\n" * (MAX_JSON_BYTES // 8), "expected at most"),
    ):
        for side in ("train", "test"):
            (tmp_path / f"{side}list01.txt").write_bytes(content)
        with pytest.raises(ValueError, match=message):
            catalog.read_ucf101_lists(tmp_path)


# --- images and videos -------------------------------------------------------------------------------------------

JPEG = encode_rgb(np.zeros((16, 16, 3), np.uint8), 90)


def claiming(jpeg, height, width):
    """The same JPEG, whose header claims another size."""
    at = jpeg.index(b"\xff\xc0") + 5
    changed = jpeg[:at] + struct.pack(">HH", height, width) + jpeg[at + 4 :]
    assert coded_size(changed)[:2] == (height, width)
    return changed


def png(height, width):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")


@pytest.mark.parametrize("image", [claiming(JPEG, 65_500, 65_500), png(65_500, 65_500)], ids=["jpeg", "png"])
def test_an_image_that_claims_gigapixels_is_not_decoded(tmp_path, image):
    (tmp_path / "image.jpg").write_bytes(image)
    with bounded_memory():
        for decode in (decode_rgb, decode_grey):
            with pytest.raises(ValueError, match="bytes that"):
                decode(image)
        with pytest.raises(ValueError, match="no image that OpenCV reads"):
            read_image(ImageSource("a/image", "a", tmp_path / "image.jpg", 0, len(image), None), 64)


def test_a_jpeg_of_a_thousand_scans_is_not_decoded():
    scan = JPEG[JPEG.index(b"\xff\xda") : -2]
    with pytest.raises(ValueError, match="more than 200 scans"):
        decode_rgb(JPEG[:-2] + scan * 1000 + JPEG[-2:])


def test_an_image_too_long_to_be_scaled_is_refused():
    with bounded_memory(), pytest.raises(VideoError, match="too long"):
        resize(np.zeros((1, 60_000, 3), np.uint8), 1000)


@pytest.mark.parametrize("content", [claiming(JPEG, 65_500, 65_500), JPEG + bytes(3_000_000), None])
def test_extracted_jpegs_are_bounded(tmp_path, content):
    folder = tmp_path / "flow" / "a" / "v"
    folder.mkdir(parents=True)
    for name in ("img_00001", "img_00002", "flow_x_00001", "flow_y_00001"):
        (folder / f"{name}.jpg").write_bytes(content or JPEG)
    if content is None:
        replace(folder / "img_00001.jpg", "fifo")
    (video,) = list_flow_dirs(tmp_path / "flow", None, None)
    report = write_flow_dir(FlowDirTask(video, None, tmp_path / "fragment", 20.0, None))
    assert re.search("claims|no regular file", report.bad["a/v"])


def test_image_tars_are_bounded(tmp_path):
    for label in (b"1" * 5000, b"9" * 30, b"1" * 100_000, b"-1"):
        tar_of(tmp_path / "train.tar", ("0.jpg", JPEG, {}), ("0.cls", label, {}))
        with pytest.raises(ValueError, match="train.tar: (sample '0' has class|a header or label claims)"):
            read_source(str(tmp_path / "train.tar"))
    for name in ("../../0", "a/../../0", "a/\x1b[2J"):
        tar_of(tmp_path / "train.tar", (f"{name}.jpg", JPEG, {}), (f"{name}.cls", b"1", {}))
        with pytest.raises(ValueError, match="Video id"):
            read_source(str(tmp_path / "train.tar"))
    tar_of(
        tmp_path / "train.tar",
        ("0.jpg", b"", {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}),
        ("0.cls", b"1", {}),
    )
    with pytest.raises(ValueError, match="sample '0' has cls; expected"):
        read_source(str(tmp_path / "train.tar"))
    name = tarfile.TarInfo("././@LongLink")
    name.type, name.size = tarfile.GNUTYPE_LONGNAME, 2
    (tmp_path / "train.tar").write_bytes((name.tobuf(tarfile.GNU_FORMAT) + b"a\0".ljust(512, b"\0")) * 3000)
    with pytest.raises(ValueError, match="train.tar"):
        read_source(str(tmp_path / "train.tar"))


@pytest.fixture
def video(tmp_path):
    write_video(tmp_path / "real.avi", [np.full((48, 64, 3), 20 * k, np.uint8) for k in range(5)])
    return tmp_path / "real.avi"


PLAYLISTS = {
    "concat": "ffconcat version 1.0\nfile 'real.avi'\n",
    "hls": "#EXTM3U\n#EXT-X-VERSION:3\n#EXT-X-TARGETDURATION:1\n#EXTINF:1.0,\nreal.avi\n#EXT-X-ENDLIST\n",
    "sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n",
}


@pytest.mark.parametrize("extension", [".avi", ".mp4", ".mkv", ".ts"])
@pytest.mark.parametrize("kind", PLAYLISTS)
def test_a_playlist_by_the_name_of_a_video_leads_nowhere(video, kind, extension):
    path = video.with_name(f"list{extension}")
    path.write_text(PLAYLISTS[kind])
    with pytest.raises(VideoError, match="cannot be opened"):
        list(read_frames(path))


def test_without_the_white_list_the_playlist_would_be_read(video, monkeypatch):
    """So that the test before this one proves something."""
    from flow import video as module

    path = video.with_name("list.avi")
    path.write_text(PLAYLISTS["concat"])
    monkeypatch.setattr(module, "_FFMPEG_OPTIONS", "threads;1")
    assert len(list(read_frames(path))) == 5


def test_a_pattern_is_no_name_of_many_files(video):
    for k in range(3):
        (video.parent / f"img_{k:03d}.jpg").write_bytes(JPEG)
    with pytest.raises(VideoError, match="cannot be opened"):
        list(read_frames(video.parent / "img_%03d.jpg"))
    odd = video.rename(video.with_name("img_%03d.avi"))
    assert len(list(read_frames(odd))) == 5, "as a name of one file it is one"


@pytest.mark.parametrize("name", ["| mkdir pwned;.avi", "$(mkdir pwned).avi", "pipe:0.avi", "http:x.avi", "-i.avi"])
def test_no_name_is_a_command(video, monkeypatch, name):
    monkeypatch.chdir(video.parent)
    video.rename(name)
    assert len(list(read_frames(Path(name)))) == 5
    assert os.listdir() == [name]


@pytest.mark.parametrize("size", [(65_500, 65_500), (8192, 4096)])
def test_a_video_that_claims_gigapixels_is_not_decoded(video, size):
    """In its container's headers and in every packet."""
    content = video.read_bytes()
    for old, new in (
        (struct.pack("<II", 64, 48), struct.pack("<II", size[1], size[0])),
        (b"\x08" + struct.pack(">HH", 48, 64), b"\x08" + struct.pack(">HH", *size)),
    ):
        assert old in content
        content = content.replace(old, new)
    video.write_bytes(content)
    with bounded_memory(300), pytest.raises(VideoError, match="too large frames|cannot be opened|is damaged"):
        list(read_frames(video))


@pytest.mark.parametrize("kind", NOT_REGULAR)
def test_a_video_that_is_no_regular_file_is_refused(video, kind):
    replace(video, kind)
    with pytest.raises(ValueError, match="no regular file|Is a directory"):
        list(read_frames(video))
