"""Images and displacement components as JPEG, and back.

A component is mapped linearly from its range (lo, hi) in px/frame to the codes 0..255 and stored as a grey JPEG;
"after decompression" it is "rescaled back to its original range" (Simonyan & Zisserman 2014, sec. 5).

    code  = round(255 * (value - lo) / (hi - lo))
    value = lo + code * (hi - lo) / 255
"""

from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from flow.video import import_cv2

NAME = "linear-jpeg"
VERSION = 1

#: A still component has no range of its own. It is widened to this, so that dequantisation never divides by zero.
MIN_RANGE_PX = 1e-3
Floats = npt.NDArray[np.float32]

#: No field has larger values, px/frame: a flow method that finds them has failed, an index that says so is damaged.
MAX_RANGE_PX = 1e6


@dataclass(frozen=True)
class Codec:
    """How the components of a packed set are encoded: part of its metadata, compared when it is loaded.

    range: "per-field", each component over its own (min, max); or "fixed", all over (-bound_px, bound_px), saturating,
        as common flow JPEG folders do (bound_px = 20).
    quality: of JPEG, 1..100, for components and RGB frames; None for files of other tools, which do not tell it.
    """

    range: str = "per-field"
    bound_px: float | None = None
    quality: int | None = 90
    name: str = NAME
    version: int = VERSION

    def __post_init__(self) -> None:
        if (self.name, self.version) != (NAME, VERSION):
            raise ValueError(
                f"The data are encoded with {self.name!r:.40} version {self.version!r:.40}, this code reads {NAME} "
                f"version {VERSION}. Pack the videos again, or use the release that wrote them."
            )
        if self.range not in ("per-field", "fixed") or (self.range == "fixed") != (self.bound_px is not None):
            raise ValueError(
                f"range={self.range!r:.40} with bound_px={self.bound_px!r:.40}: range is 'per-field' without a "
                "bound, or 'fixed' with one."
            )
        if self.bound_px is not None and not 0 < self.bound_px < np.inf:
            raise ValueError(f"bound_px={self.bound_px} px: the bound is a positive number of pixels, such as 20.")
        if self.quality is not None and not 1 <= self.quality <= 100:
            raise ValueError(f"quality={self.quality}: JPEG quality is 1..100; 90 is the default.")

    @staticmethod
    def from_option(range_option: str, quality: int | None) -> "Codec":
        """Codec of the command line's `--range`: "per-field", or a bound in px such as "20"."""
        if range_option == "per-field":
            return Codec(quality=quality)
        try:
            bound_px = float(range_option)
        except ValueError:
            raise ValueError(f"range {range_option!r}: give 'per-field', or a bound in px such as 20.") from None
        return Codec(range="fixed", bound_px=bound_px, quality=quality)

    @staticmethod
    def from_metadata(metadata: dict[str, Any]) -> "Codec":
        """Codec of a `dataset.json`. Raises ValueError if this code does not read that encoding."""
        try:
            return Codec(**metadata)
        except TypeError:
            raise ValueError(f"codec metadata {metadata!r:.300}: expected the keys {list(asdict(Codec()))}.") from None

    def metadata(self) -> dict[str, Any]:
        return asdict(self)


class Coded(NamedTuple):
    """An encoded component: JPEG bytes, and the range that the codes 0..255 span, in px/frame."""

    jpeg: bytes
    lo: float
    hi: float


def encode_component(component: npt.NDArray[np.float32], codec: Codec) -> Coded:
    """Quantise and compress one component (H, W) px/frame.

    Before JPEG the error is at most half a step, (hi - lo) / 510; a fixed range also saturates at its bound.
    Raises ValueError for values that are not finite, or with a per-field range larger than any displacement.
    """
    smallest, largest = float(component.min()), float(component.max())  # of which one is NaN if any value is
    largest_px = MAX_RANGE_PX if codec.bound_px is None else float(np.finfo(np.float32).max)
    if not (-largest_px <= smallest and largest <= largest_px):
        raise ValueError(
            f"A component of shape {component.shape} holds values from {smallest:g} to {largest:g}; those of a field "
            f"are finite and within +-{largest_px:g} px/frame. The flow method failed on this pair of frames."
        )
    if codec.bound_px is not None:
        lo, hi = -codec.bound_px, codec.bound_px
    else:
        # Stored ranges are float32: round them now, so that what is written is what was quantised with.
        lo, hi = smallest, max(largest, smallest + max(MIN_RANGE_PX, abs(smallest) * 1e-4))
        hi = float(np.float32(hi))
    offset = component - np.float32(lo)
    if codec.bound_px is not None:
        np.clip(offset, 0, hi - lo, out=offset)
    # Scaled, rounded half to even and narrowed in one pass; nothing is negative, so that "Abs" changes nothing.
    codes = import_cv2().convertScaleAbs(offset, alpha=float(np.float32(255 / (hi - lo))))
    return Coded(_encode(codes, codec.quality), lo, hi)


def sound_ranges(lo: Floats, hi: Floats, mean: Floats) -> npt.NDArray[np.bool_]:
    """Which ranges and means, (n,) px/frame, a field may have."""
    return (-MAX_RANGE_PX <= lo) & (lo < hi) & (hi <= 2 * MAX_RANGE_PX) & np.isfinite(mean)


def decode_component(jpeg: bytes, lo: float, hi: float) -> npt.NDArray[np.float32]:
    """The component (H, W) float32 px/frame that `encode_component` stored. Raises ValueError if undecodable."""
    return dequantise(decode_grey(jpeg), lo, hi)


def dequantise(codes: npt.NDArray[np.uint8], lo: float, hi: float) -> Floats:
    """Component float32 px/frame that codes 0..255 stand for."""
    component = codes * np.float32((hi - lo) / 255)
    component += np.float32(lo)
    return component


def coding_error(component: npt.NDArray[np.float32], coded: Coded) -> tuple[float, float]:
    """Sum and largest of |decoded - component| in px, of a component (H, W) that was decoded for it.

    So it proves the JPEG too: raises ValueError if that cannot be decoded, or has another size.
    """
    decoded = decode_component(*coded)
    if decoded.shape != component.shape:
        raise ValueError(f"A component of shape {component.shape} was decoded with shape {decoded.shape}.")
    cv2 = import_cv2()
    return cv2.norm(decoded, component, cv2.NORM_L1), cv2.norm(decoded, component, cv2.NORM_INF)


def decode_grey(jpeg: bytes) -> npt.NDArray[np.uint8]:
    """The codes (H, W) uint8 of a component. Raises ValueError if undecodable."""
    return _decode(jpeg, import_cv2().IMREAD_GRAYSCALE)


def encode_rgb(frame: npt.NDArray[np.uint8], quality: int | None) -> bytes:
    """JPEG of an RGB frame (H, W, 3) uint8."""
    cv2 = import_cv2()
    return _encode(cv2.cvtColor(frame, cv2.COLOR_RGB2BGR), quality)


def decode_rgb(jpeg: bytes) -> npt.NDArray[np.uint8]:
    """RGB frame (H, W, 3) uint8 of a JPEG. Raises ValueError if undecodable."""
    cv2 = import_cv2()
    return np.asarray(cv2.cvtColor(_decode(jpeg, cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB), np.uint8)


def check_rgb(jpeg: bytes, height: int, width: int) -> None:
    """Raise ValueError unless a colour JPEG has this size and can be decoded.

    Decoded to an eighth of its sides: all its codes are read, as for the whole, in a quarter of the time.
    """
    size = coded_size(jpeg)
    reduced = _decode(jpeg, import_cv2().IMREAD_REDUCED_COLOR_8).shape
    if size != (height, width, 3) or reduced != (-(-height // 8), -(-width // 8), 3):
        raise ValueError(f"An image of {height}x{width} px was encoded as one of {size[0]}x{size[1]} px.")


def _encode(image: npt.NDArray[np.uint8], quality: int | None) -> bytes:
    cv2 = import_cv2()
    if quality is None:
        raise ValueError("quality=None: files of other tools are packed as they are. To encode, give 1..100.")
    done, jpeg = cv2.imencode(".jpg", np.ascontiguousarray(image), [cv2.IMWRITE_JPEG_QUALITY, quality])
    if not done:
        raise ValueError(f"OpenCV could not encode an image of shape {image.shape} as JPEG.")
    return bytes(jpeg)


def _decode(jpeg: bytes, mode: int) -> npt.NDArray[np.uint8]:
    if jpeg.startswith(b"\xff\xd8") and jpeg.count(b"\xff\xda") > MAX_SCANS:
        raise ValueError(f"{len(jpeg)} bytes with more than {MAX_SCANS} scans of one image: it would take very long.")
    cv2 = import_cv2()
    try:
        image = cv2.imdecode(np.frombuffer(jpeg, np.uint8), mode)
    except cv2.error as error:
        raise ValueError(f"{len(jpeg)} bytes that OpenCV does not decode: {str(error).strip()}.") from None
    if image is None:
        raise ValueError(f"{len(jpeg)} bytes that are no decodable JPEG.")
    return np.asarray(image, np.uint8)


# JPEG markers that open a frame header (SOF): height, width and number of channels stand in it.
# 0xC4, 0xC8 and 0xCC lie in the range but mean something else.
_SOF = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_SEQUENTIAL = (0xC0, 0xC1)
_SOS = 0xDA
#: And tables, application data and comments.
_IN_HEADER = _SOF | {_SOS, 0xC4, 0xDB, 0xDD, 0xFE, *range(0xE0, 0xF0)}


#: Of a progressive JPEG. Encoders write ten or so; each costs a pass over the image, however short it is.
MAX_SCANS = 200

Count = TypeVar("Count", int, npt.NDArray[np.int64])

#: The end-of-image marker: what a JPEG ends with.
JPEG_END = b"\xff\xd9"


def max_jpeg_bytes(height: Count, width: Count, channels: int) -> Count:
    """More bytes than any JPEG of that size needs; of one, or of many (n,)."""
    return height * width * (6 if channels == 3 else 2) + 65_536


def coded_size(jpeg: bytes) -> tuple[int, int, int]:
    """Size (height, width, channels) that a JPEG's header claims. Raises ValueError as `frame_header` does."""
    return frame_header(jpeg).size


class FrameHeader(NamedTuple):
    """size: height, width, channels. num_bytes: up to the data of the first scan. is_alone: a decoder looks at no other
    scan, however many there are, since the first one of a sequential frame holds all channels."""

    size: tuple[int, int, int]
    num_bytes: int
    is_alone: bool


def frame_header(jpeg: bytes) -> FrameHeader:
    """What a JPEG's header claims.

    Found by walking the segments; nothing is decoded. Raises ValueError unless they are an unbroken chain, with one
    frame header of 8-bit samples and a scan: at anything else nvImageCodec's parser may end the process.
    """
    if jpeg[:2] != b"\xff\xd8":
        raise ValueError(f"The bytes begin with {jpeg[:2].hex() or 'nothing'}; a JPEG begins with ffd8.")
    at, size, frame = 2, None, 0
    while at + 4 <= len(jpeg) and jpeg[at] == 0xFF:
        marker, length = jpeg[at + 1], int.from_bytes(jpeg[at + 2 : at + 4], "big")
        if marker not in _IN_HEADER:
            break
        end = at + 2 + length
        if length < 2 or end > len(jpeg):
            raise ValueError(f"A JPEG of {len(jpeg)} bytes with a segment of {length} bytes at byte {at}.")
        if marker in _SOF:
            precision, *size_bytes, channels = jpeg[at + 4 : at + 10].ljust(6, b"\0")
            if size is not None or precision != 8 or length != 8 + 3 * channels:
                raise ValueError(f"A JPEG with a second frame header at byte {at}, or one that contradicts itself.")
            height, width = (int.from_bytes(part, "big") for part in (size_bytes[:2], size_bytes[2:]))
            size, frame = (height, width, channels), marker
        elif marker == _SOS:
            if size is None:
                break
            return FrameHeader(size, end, frame in _SEQUENTIAL and jpeg[at + 4 : end][:1] == bytes([size[2]]))
        at = end
    raise ValueError(f"A JPEG of {len(jpeg)} bytes whose header breaks off at byte {at}: no frame header, or no scan.")
