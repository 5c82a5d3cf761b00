"""Fields and their codec: round trips, ranges, damage."""

import numpy as np
import pytest

from flow import fields
from flow.codec import (
    Codec,
    check_rgb,
    coded_size,
    coding_error,
    decode_component,
    decode_grey,
    decode_rgb,
    encode_component,
    encode_rgb,
    frame_header,
)
from tests.conftest import smooth_noise


@pytest.fixture
def component():
    return smooth_noise(np.random.default_rng(0), (64, 80), 3)


@pytest.mark.parametrize("codec", [Codec(quality=100), Codec(range="fixed", bound_px=20.0, quality=100)])
def test_quantisation_error_is_within_half_a_step(component, codec):
    """JPEG itself adds to it: its effect is bounded by one code at quality 100, on a smooth component."""
    coded = encode_component(component, codec)
    step = (coded.hi - coded.lo) / 255
    exact = np.rint((component - coded.lo) / step)
    assert np.abs(decode_grey(coded.jpeg) - exact).max() <= 1
    error = np.abs(decode_component(coded.jpeg, coded.lo, coded.hi) - component)
    assert error.max() <= 1.5 * step + 1e-6 and error.mean() <= 0.5 * step


def test_own_range_is_the_components_and_a_fixed_one_saturates(component):
    own = encode_component(component, Codec())
    assert own.lo == component.min() and own.hi == component.max()
    fixed = Codec(range="fixed", bound_px=2.0)
    coded = encode_component(component, fixed)
    assert (coded.lo, coded.hi) == (-2.0, 2.0)
    decoded = decode_component(coded.jpeg, coded.lo, coded.hi)
    assert np.abs(decoded - component.clip(-2, 2)).mean() < 0.05
    calm = component / 4  # the narrower the range, the more a fixed bound wastes
    fine, coarse = (
        np.abs(decode_component(*encode_component(calm, c)) - calm).mean()
        for c in (Codec(), Codec(range="fixed", bound_px=20.0))
    )
    assert fine < coarse / 2


@pytest.mark.parametrize("codec", [Codec(quality=60), Codec(range="fixed", bound_px=2.0)])
def test_the_coding_error_is_that_of_the_decoded_component(component, codec):
    coded = encode_component(component, codec)
    error = np.abs(decode_component(*coded) - component)
    total, largest = coding_error(component, coded)
    assert total == pytest.approx(error.sum(dtype=np.float64), rel=1e-9) and largest == error.max()
    with pytest.raises(ValueError, match=r"shape \(64, 79\) was decoded with shape \(64, 80\)"):
        coding_error(component[:, :-1], coded)


def test_displacements_beyond_all_bounds_saturate(component):
    component[0, :8], component[0, 8:16] = 3e38, -3e38
    codes = decode_grey(encode_component(component, Codec(range="fixed", bound_px=20.0, quality=100)).jpeg)
    assert codes[0, :7].min() > 250 and codes[0, 9:16].max() < 5


@pytest.mark.parametrize("value", [0.0, 3.25, -1e4])
def test_a_still_component_keeps_its_value(value):
    coded = encode_component(np.full((32, 32), value, np.float32), Codec())
    assert coded.hi > coded.lo
    assert np.abs(decode_component(*coded) - value).max() <= 1e-3 * max(1, abs(value))


@pytest.mark.parametrize("codec", [Codec(), Codec(range="fixed", bound_px=20.0)])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 2e6])
def test_what_is_no_displacement_is_refused(component, value, codec):
    component[3, 3] = value
    if codec.bound_px is not None and np.isfinite(value):
        assert encode_component(component, codec).hi == codec.bound_px  # saturates
        return
    with pytest.raises(ValueError, match="holds values from .* The flow method failed"):
        encode_component(component, codec)


def test_options_and_metadata(component):
    assert Codec.from_option("per-field", 80) == Codec(quality=80)
    assert Codec.from_option("20", 90) == Codec(range="fixed", bound_px=20.0)
    for codec in (Codec(), Codec(range="fixed", bound_px=20.0, quality=75)):
        assert Codec.from_metadata(codec.metadata()) == codec
    with pytest.raises(ValueError, match="give 'per-field', or a bound in px"):
        Codec.from_option("auto", 90)
    with pytest.raises(ValueError, match="a positive number"):
        Codec.from_option("-3", 90)
    with pytest.raises(ValueError, match="quality=0"):
        Codec(quality=0)
    with pytest.raises(ValueError, match="version 7"):
        Codec.from_metadata({**Codec().metadata(), "version": 7})
    with pytest.raises(ValueError, match="expected the keys"):
        Codec.from_metadata({"scale": 3})


def test_rgb_keeps_its_channels():
    frame = np.zeros((32, 48, 3), np.uint8)
    frame[:, :, 0], frame[:, :, 2] = 200, 40
    decoded = decode_rgb(encode_rgb(frame, 95)).astype(int)
    assert np.abs(decoded - frame).max() <= 4


def test_coded_size_reads_the_header_alone(component):
    jpeg = encode_component(component, Codec()).jpeg
    assert coded_size(jpeg) == (64, 80, 1)
    assert frame_header(jpeg[: frame_header(jpeg).num_bytes]) == frame_header(jpeg)
    assert coded_size(encode_rgb(np.zeros((20, 30, 3), np.uint8), 90)) == (20, 30, 3)
    with pytest.raises(ValueError, match="begins with ffd8"):
        coded_size(b"\x89PNG")
    with pytest.raises(ValueError, match="no decodable JPEG"):
        decode_grey(b"nothing")


def segments(jpeg):
    """A header's segments (marker, content), and what follows them."""
    at, found = 2, []
    while not found or found[-1][0] != 0xDA:
        length = int.from_bytes(jpeg[at + 2 : at + 4], "big")
        found.append((jpeg[at + 1], jpeg[at + 4 : at + 2 + length]))
        at += 2 + length
    return found, jpeg[at:]


def joined(parts, rest):
    return b"\xff\xd8" + b"".join(bytes([0xFF, m]) + (len(c) + 2).to_bytes(2, "big") + c for m, c in parts) + rest


@pytest.mark.parametrize("channels", [1, 3])
def test_a_header_that_is_no_whole_chain_is_refused(component, channels):
    """At some of these the decoder of the loaders ends its process; any length cut off is refused too."""
    colour = np.random.default_rng(0).integers(0, 255, (64, 80, 3), np.uint8)
    jpeg = encode_rgb(colour, 90) if channels == 3 else encode_component(component, Codec()).jpeg
    parts, rest = segments(jpeg)
    assert joined(parts, rest) == jpeg and frame_header(jpeg) == ((64, 80, channels), len(jpeg) - len(rest), True)
    (sof,) = [part for part in parts if part[0] == 0xC0]
    at, place = parts.index(sof), jpeg.index(b"\xff\xc0")
    other = [*parts[:at], (0xC0, bytes([12]) + sof[1][1:]), *parts[at + 1 :]]
    broken = {
        "begins with ffd8": [b"\x89PNG", b"\0" + jpeg[1:]],
        "contradicts itself": [joined(other, rest), joined([*parts[: at + 1], *parts[at:]], rest)],
        "a segment of": [jpeg[: place + 2] + bytes([0, length]) + jpeg[place + 4 :] for length in (0, 1)],
        "no frame header, or no scan": [
            joined(parts[:at] + parts[at + 1 :], rest),
            joined(parts[:-1], rest),
            jpeg[:place] + b"\xff" + jpeg[place:],
            jpeg[:place] + b"\xff\0" + jpeg[place:],
            jpeg[:place] + b"\0" + jpeg[place:],
        ],
    }
    for message, cases in broken.items():
        for case in cases:
            with pytest.raises(ValueError, match=message):
                frame_header(case)
    for size in range(2, len(jpeg) - len(rest)):
        with pytest.raises(ValueError, match="A JPEG of"):
            frame_header(jpeg[:size])


def test_mirror_twice_is_the_identity_and_turns_right_into_left():
    field = np.stack([smooth_noise(np.random.default_rng(k), (20, 30)) for k in range(2)])
    mirrored = fields.mirror_field(field)
    assert np.array_equal(fields.mirror_field(mirrored), field)
    assert np.array_equal(mirrored[0], -field[0, :, ::-1]) and np.array_equal(mirrored[1], field[1, :, ::-1])


def test_mean_subtraction_removes_a_camera_motion():
    field = np.stack([smooth_noise(np.random.default_rng(k), (20, 30)) for k in range(2)])
    moved = field + np.array([5, -2], np.float32)[:, None, None]
    assert np.allclose(fields.subtract_mean(moved), fields.subtract_mean(field), atol=1e-5)
    assert np.allclose(fields.field_mean(fields.subtract_mean(moved)), 0, atol=1e-5)


def test_stacking_follows_equation_1():
    fields_of_video = np.arange(5 * 2 * 3 * 4, dtype=np.float32).reshape(5, 2, 3, 4)
    stack = fields.stack_fields(fields_of_video, 1, 3)
    for k in range(3):  # I_tau(u, v, 2k-1) = dx_{tau+k-1}, I_tau(u, v, 2k) = dy_{tau+k-1}
        assert np.array_equal(stack[2 * k], fields_of_video[1 + k, 0])
        assert np.array_equal(stack[2 * k + 1], fields_of_video[1 + k, 1])
    for tau in (-1, 3):
        with pytest.raises(ValueError, match=rf"tau={tau} with L=3 .* Take tau in \[0, 2\]"):
            fields.stack_fields(fields_of_video, tau, 3)


@pytest.mark.parametrize("size", [(16, 16), (17, 33), (100, 61)])
def test_a_colour_jpeg_is_proven_by_its_size_and_codes(size):
    image = np.random.default_rng(0).integers(0, 255, (*size, 3), np.uint8)
    jpeg = encode_rgb(image, 90)
    check_rgb(jpeg, *size)
    with pytest.raises(ValueError, match=f"was encoded as one of {size[0]}x{size[1]} px"):
        check_rgb(jpeg, size[0] + 1, size[1])
    with pytest.raises(ValueError, match="no decodable JPEG|with a segment of"):
        check_rgb(jpeg[:40], *size)
    grey = encode_component(image[..., 0].astype(np.float32), Codec()).jpeg
    with pytest.raises(ValueError, match="was encoded"):
        check_rgb(grey, *size)
