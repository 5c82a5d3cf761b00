"""flow.extract: every method measures a known motion, in px/frame, with the right sign and the right channel order."""

import json

import numpy as np
import pytest

from flow.codec import decode_grey
from flow.demo import draw_texture, shift
from flow.extract import DEFAULT_METHOD, FLOW_METHODS, flow_method
from flow.video import import_cv2


def shifted_pair(dx, dy, height=96, width=128):
    """Two grey frames (H, W) uint8; the second shows the first moved by (dx, dy) px."""
    texture = draw_texture(np.random.default_rng(3), 256, 256)
    return [shift(texture, s * dx, s * dy, width, height, wrap=True).astype(np.uint8) for s in (0, 1)]


@pytest.mark.parametrize("name", FLOW_METHODS)
@pytest.mark.parametrize(("dx", "dy"), [(2.5, -1.25), (-3.0, 1.0)])
def test_a_constant_motion_is_found(name, dx, dy):
    field = flow_method(name)(*shifted_pair(dx, dy))
    assert field.shape == (2, 96, 128) and field.dtype == np.float32
    inner = field[:, 12:-12, 12:-12]
    assert np.abs(np.median(inner, axis=(1, 2)) - (dx, dy)).max() < 0.1
    assert np.abs(inner - np.array([dx, dy]).reshape(2, 1, 1)).mean() < 0.15


def test_the_backward_field_is_the_opposite_of_a_constant_motion():
    grey0, grey1 = shifted_pair(2, 1)
    method = flow_method()
    inner = (slice(None), slice(16, -16), slice(16, -16))
    assert np.abs(method(grey0, grey1)[inner] + method(grey1, grey0)[inner]).mean() < 0.1


@pytest.mark.parametrize("name", ["farneback", "dis"])
def test_flow_of_the_mirrored_pair_is_the_mirrored_flow(name):
    grey0, grey1 = shifted_pair(2.5, -1.25)
    method = flow_method(name)
    field = method(grey0, grey1)
    mirrored = method(np.ascontiguousarray(grey0[:, ::-1]), np.ascontiguousarray(grey1[:, ::-1]))[:, :, ::-1]
    right = np.abs(mirrored * np.array([-1, 1]).reshape(2, 1, 1) - field).mean()
    assert right < 0.1 and 5 * right < np.abs(mirrored - field).mean()


def test_nothing_is_carried_over_from_pair_to_pair():
    pair, other = shifted_pair(2, 1), shifted_pair(-4, 3)
    used = flow_method()
    used(*other)
    assert np.array_equal(used(*pair), flow_method()(*pair))


@pytest.mark.parametrize("name", FLOW_METHODS)
def test_metadata_say_method_parameters_and_library(name):
    metadata = json.loads(json.dumps(flow_method(name).metadata()))
    assert metadata["method"] == name and metadata["version"] == import_cv2().__version__
    assert metadata["library"] == "opencv-contrib-python" and len(metadata["parameters"]) >= 7


def test_wrong_input_is_refused():
    with pytest.raises(ValueError, match="method 'brox' is unknown; there are farneback, dis, tvl1"):
        flow_method("brox")
    grey = np.zeros((32, 32), np.uint8)
    for other in (np.zeros((32, 33), np.uint8), np.zeros((32, 32), np.float32), np.zeros((32, 32, 3), np.uint8)):
        with pytest.raises(ValueError, match="expected two uint8"):
            flow_method()(grey, other)


def read_flo(path):
    """Middlebury .flo: the field (2, H, W) px."""
    content = path.read_bytes()
    width, height = np.frombuffer(content, "<i4", 2, 4)
    return np.frombuffer(content, "<f4", offset=12).reshape(height, width, 2).transpose(2, 0, 1)


def test_the_default_is_the_better_of_the_fast_methods_on_real_pairs(real_data):
    errors = {"farneback": [], "dis": []}
    for folder in sorted((real_data / "flow_gt").iterdir()):
        grey0, grey1 = (decode_grey((folder / f"frame1{n}.png").read_bytes()) for n in (0, 1))
        truth = read_flo(folder / "flow10.flo")
        known = (np.abs(truth) < 1000).all(axis=0)
        for name in errors:
            error = flow_method(name)(grey0, grey1) - truth
            errors[name].append(np.hypot(*error)[known].mean())
    assert DEFAULT_METHOD == "dis"
    assert np.mean(errors["dis"]) < 0.4 < np.mean(errors["farneback"])
    assert all(dis < farneback for dis, farneback in zip(*reversed(errors.values()), strict=True))
