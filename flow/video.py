"""Reading and writing video files: the only module that decodes video, and the one door to OpenCV.

Frames are streamed, so a video of any length takes the memory of a few frames. What a header says about the number of
frames is never believed: frames are counted as they are decoded, and what is missing is an error, not a shorter video.
"""

import os
import re
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt

from flow.untrusted import MAX_FRAME_PX, MAX_IMAGE_PX, open_regular

VIDEO_EXTENSIONS = frozenset(
    ".3gp .asf .avi .flv .m2ts .m4v .mkv .mov .mp4 .mpeg .mpg .mts .ogv .ts .vob .webm .wmv".split()
)

#: What FFmpeg may open: the containers of those files, and of protocols none that leads to anything else. Or a playlist
#: by the name of x.avi would have it read other files, or the network.
_FFMPEG_OPTIONS = "protocol_whitelist;file|format_whitelist;asf,avi,flv,m4v,matroska,mov,mpeg,mpegts,mpegvideo,ogg"

Frame = npt.NDArray[np.uint8]


_NO_VIDEO = "cannot be opened: no video that OpenCV's FFmpeg reads"
_TOO_LARGE = f"has too large frames: expected at most {MAX_FRAME_PX:,} px"


class VideoError(ValueError):
    """A video file cannot be used. The message says what was found."""


def import_cv2() -> ModuleType:
    """The cv2 module, imported late. Raises ImportError that names the system packages a slim image lacks."""
    # FFmpeg reports every concealed error on stderr, in the middle of progress bars; we report damage ourselves.
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
    os.environ.setdefault("OPENCV_LOG_LEVEL", "ERROR")
    os.environ.setdefault("OPENCV_IO_MAX_IMAGE_PIXELS", str(MAX_IMAGE_PX))  # read when it is loaded
    os.environ["OPENCV_FFMPEG_CAPTURE_OPTIONS"] = _FFMPEG_OPTIONS  # read when a video is opened
    try:
        import cv2
    except ImportError as error:
        raise ImportError(
            f"OpenCV cannot be loaded: {error}. The package is opencv-contrib-python. It links libGL.so.1, "
            "libxcb.so.1, libglib-2.0.so.0 and libgthread-2.0.so.0, which slim images lack; on Debian and Ubuntu: "
            "apt-get install libgl1 libxcb1 libglib2.0-0"
        ) from error
    return cv2


def resize(frame: Frame, size_px: int) -> Frame:
    """Scale an image (H, W[, 3]) so that min(H, W) = size_px; the other side keeps the aspect, to the nearest pixel.

    Shrinks by area averaging, which keeps fine texture from aliasing into false motion, and enlarges bilinearly. Raises
    VideoError if more than MAX_FRAME_PX come of it.
    """
    height, width = frame.shape[:2]
    short_px = min(height, width)
    if short_px == size_px:
        return frame
    cv2 = import_cv2()
    size = (max(1, round(width * size_px / short_px)), max(1, round(height * size_px / short_px)))
    if size[0] * size[1] > MAX_FRAME_PX:
        raise VideoError(f"of {width}x{height} px is too long: scaled to {size_px} px it has {size[0]}x{size[1]} px")
    method = cv2.INTER_AREA if short_px > size_px else cv2.INTER_LINEAR
    return np.asarray(cv2.resize(frame, size, interpolation=method), np.uint8)


def to_grey(frame: Frame) -> Frame:
    """Luma (H, W) uint8 of an RGB frame (H, W, 3) uint8."""
    cv2 = import_cv2()
    return np.asarray(cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY), np.uint8)


def read_frames(path: Path, size_px: int | None = None) -> Iterator[Frame]:
    """Stream the frames of a video: RGB (H, W, 3) uint8 with min(H, W) = size_px, or as stored for None.

    Raises VideoError if the file cannot be opened, is cut off or damaged, holds fewer than two frames, changes its size
    on the way or has too large frames, and ValueError if it is no regular file. Some of that shows only at the end:
    frames that came before an error are not to be used.

    FFmpeg conceals damage; what can be seen is a container that claims more bytes than the file has (AVI, MP4, MOV),
    frames after one that failed, and in AVI files a broken chain of chunks or fewer frames than packets. A change of
    size is seen in MJPEG and in MPEG-4 part 2 (XviD, DivX); other codecs' frames come rescaled to the first one's size.
    """
    cv2 = import_cv2()
    _check_container(path)
    num_packets = _check_packets(path)
    capture = _open(path, [cv2.CAP_PROP_N_THREADS, 1])  # one thread: the pool runs one process per core
    try:
        if not capture.isOpened():
            raise VideoError(_NO_VIDEO)
        num_frames, shape = 0, None
        while True:
            read, frame = capture.read()
            if not read:
                break
            shape = shape or frame.shape
            if frame.shape != shape:
                raise VideoError(f"changes size: frame {num_frames} is {frame.shape}, frame 0 was {shape}")
            num_frames += 1
            yield resize(np.asarray(cv2.cvtColor(frame, cv2.COLOR_BGR2RGB), np.uint8), size_px or min(shape[:2]))
        # At the end of a sound file reading fails for good.
        if any(capture.grab() for _ in range(8)):
            raise VideoError(f"is damaged: frame {num_frames} cannot be decoded, later ones can")
    finally:
        capture.release()
    # A packed DivX stream ends with a packet that holds no frame: one less is sound.
    if path.suffix.lower() == ".avi" and num_frames < num_packets - 1:
        raise VideoError(f"is damaged: {num_frames} frames could be decoded of {num_packets} packets")
    if num_frames < 2:
        raise VideoError(f"has {num_frames} frame(s); a displacement field needs two")


class VideoHeader(NamedTuple):
    """What a container claims, right or wrong: frames per second; the number of frames, 0 if it does not say."""

    fps: float
    num_frames: int


def read_header(path: Path) -> VideoHeader:
    """What a video's container claims; 25 frames per second where it claims nothing that could be.

    Raises VideoError if the file cannot be opened, or has too large frames.
    """
    cv2 = import_cv2()
    _check_container(path)
    capture = _open(path, [cv2.CAP_PROP_N_THREADS, 1])
    try:
        if not capture.isOpened():
            raise VideoError(_NO_VIDEO)
        fps, num_frames = capture.get(cv2.CAP_PROP_FPS), capture.get(cv2.CAP_PROP_FRAME_COUNT)
    finally:
        capture.release()
    sound = 0 < num_frames < 1 << 31
    return VideoHeader(fps if 0.1 <= fps <= 1000 else 25.0, int(num_frames) if sound else 0)


def _open(path: Path, options: list[int]) -> Any:
    """A cv2.VideoCapture. Raises VideoError for frames that are too large, before one is read."""
    cv2 = import_cv2()
    # The absolute path is never taken for a URL.
    capture = cv2.VideoCapture(str(path.absolute()), cv2.CAP_FFMPEG, options)
    height, width = int(capture.get(cv2.CAP_PROP_FRAME_HEIGHT)), int(capture.get(cv2.CAP_PROP_FRAME_WIDTH))
    if height * width > MAX_FRAME_PX:
        capture.release()
        raise VideoError(f"{_TOO_LARGE}, its header claims {width}x{height} px")
    return capture


def write_video(path: Path, frames: Iterable[Frame], fps: float = 25.0, quality: int = 95) -> None:
    """Write RGB frames (H, W, 3) uint8 as Motion JPEG in AVI, with OpenCV's own writer: no codec of the system is used.

    Raises VideoError if there are no frames, they differ in size, or the file cannot be written.
    """
    cv2 = import_cv2()
    writer, shape = None, None
    try:
        for frame in frames:
            if writer is None:
                shape = frame.shape
                fourcc = cv2.VideoWriter.fourcc(*"MJPG")
                writer = cv2.VideoWriter(str(path), cv2.CAP_OPENCV_MJPEG, fourcc, fps, (shape[1], shape[0]))
                writer.set(cv2.VIDEOWRITER_PROP_QUALITY, quality)
                if not writer.isOpened():
                    raise VideoError(f"{path} cannot be written: does its folder exist, and does the name end in .avi?")
            if frame.shape != shape:
                raise VideoError(f"{path}: a frame of shape {frame.shape} after frames of shape {shape}")
            writer.write(cv2.cvtColor(frame, cv2.COLOR_RGB2BGR))
    finally:
        if writer is not None:
            writer.release()
    if writer is None:
        raise VideoError(f"{path}: a video needs at least one frame")


# --- what FFmpeg would conceal -----------------------------------------------------------------------------------


def _check_container(path: Path) -> None:
    """Raise VideoError if the file is shorter than its outermost RIFF chunk (AVI) or boxes (MP4, MOV) claim."""
    try:
        with open_regular(path) as file:
            total = os.fstat(file.fileno()).st_size
            start = file.read(12)
            if start[:4] == b"RIFF":
                claimed = _riff_bytes(file, total)
                if claimed <= total:
                    _check_chunks(file, 12, claimed)
            elif start[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip"):
                claimed = _box_bytes(file, total)
            else:
                claimed = 0
    except OSError as error:
        raise VideoError(f"cannot be opened: {error.strerror}") from None
    if claimed > total:
        raise VideoError(f"is truncated: the file has {total} bytes, its container claims {claimed}")


def _riff_bytes(file: BinaryIO, total: int) -> int:
    """End of the last RIFF chunk; OpenDML files have several. Trailing bytes are no chunk and none of our business."""
    end = 0
    while end + 8 <= total:
        file.seek(end)
        name, size = struct.unpack("<4sI", file.read(8))
        # A writer that could not seek back leaves 0 or the largest size: no claim.
        if name != b"RIFF" or size in (0, 0xFFFFFFFF):
            break
        end += 8 + size
        if end < total:
            end += size & 1
    return end


def _check_chunks(file: BinaryIO, at: int, end: int) -> None:
    """Walk the chunks of the first RIFF chunk and of its list of packets: a hole in the file breaks the chain."""
    while at + 8 <= end:
        file.seek(at)
        name, size, kind = struct.unpack("<4sI4s", file.read(12).ljust(12, b"\0"))
        if not re.fullmatch(rb"[\w ]{4}", name) or at + 8 + size > end:
            raise VideoError(f"is damaged: no sound chunk at byte {at}")
        if name == b"LIST" and kind == b"movi":
            _check_chunks(file, at + 12, at + 8 + size)
        at += 8 + size + size % 2


def _box_bytes(file: BinaryIO, total: int) -> int:
    """End of the last top-level box."""
    end = 0
    while end + 8 <= total:
        file.seek(end)
        size, name = struct.unpack(">I4s", file.read(8))
        if size == 1:
            size = int.from_bytes(file.read(8), "big")
        if size < 8 or not name.isascii():  # 0: up to the end of the file. Else bytes that are no box.
            break
        end += size
    return end


def _check_packets(path: Path) -> int:
    """Count the packets of the video stream, without decoding; raise VideoError if they code frames of two sizes."""
    capture = _open(path, [import_cv2().CAP_PROP_FORMAT, -1])
    num_packets, first = 0, None
    try:
        while capture.isOpened():
            read, packet = capture.read()
            if not read:
                break
            size = _packet_size(packet.ravel())
            first = first or size
            if size and size[0] * size[1] > MAX_FRAME_PX:
                raise VideoError(f"{_TOO_LARGE}, packet {num_packets} claims {size[1]}x{size[0]} px")
            if size and first and size != first:
                raise VideoError(
                    f"changes size from {first[1]}x{first[0]} to {size[1]}x{size[0]} px at packet {num_packets}"
                )
            num_packets += 1
    finally:
        capture.release()
    return num_packets


def _packet_size(packet: npt.NDArray[np.uint8]) -> tuple[int, int] | None:
    """(height, width) that a packet states: a JPEG's, or of an MPEG-4 part 2 video object layer, or None."""
    from flow.codec import coded_size

    head = bytes(packet[:4096])
    if head[:3] == b"\xff\xd8\xff":
        try:
            return coded_size(bytes(packet))[:2]
        except ValueError:
            return None  # a damaged packet: decoding will tell
    at = head.find(b"\0\0\1\x20")
    return _layer_size(head[at + 4 : at + 64]) if at >= 0 and b"\0\0\1\xb6" in head else None


def _layer_size(layer: bytes) -> tuple[int, int] | None:
    """(height, width) in a video object layer header, ISO/IEC 14496-2 sec. 6.2.3; None if it is no rectangle."""
    bits = "".join(f"{byte:08b}" for byte in layer).ljust(512, "0")
    at = 9  # after random access and type

    def take(count: int) -> int:
        nonlocal at
        at += count
        return int(bits[at - count : at], 2)

    if take(1):
        take(7)  # version and priority
    if take(4) == 15:
        take(16)  # pixel aspect ratio
    if take(1):
        take(3)  # chroma format, low delay
        if take(1):
            take(79)  # rate buffer
    if take(2) != 0:  # shape
        return None
    take(1)
    ticks = take(16)
    take(1)
    if take(1):
        take(max(1, (ticks - 1).bit_length()))  # fixed frame duration
    take(1)
    width = take(13)
    take(1)
    return take(13), width
