"""flow.extract: every method measures a known motion, in px/frame, with the right sign and the right channel order."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

from flow_accuracy import end_point_error, read_pairs  # noqa: E402

from flow.demo import draw_texture, shift  # noqa: E402
from flow.extract import DEFAULT_METHOD, FLOW_METHODS, flow_method, prove_method  # noqa: E402
from flow.video import import_cv2  # noqa: E402

ON_CPU = [name for name in FLOW_METHODS if name != "nvof"]


def shifted_pair(dx, dy, height=96, width=128):
    """Two grey frames (H, W) uint8; the second shows the first moved by (dx, dy) px."""
    texture = draw_texture(np.random.default_rng(3), 256, 256)
    return [shift(texture, s * dx, s * dy, width, height, wrap=True).astype(np.uint8) for s in (0, 1)]


@pytest.mark.parametrize("name", ON_CPU)
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


@pytest.mark.parametrize("name", ["farneback", "dis", "deepflow"])
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


@pytest.mark.parametrize("name", ON_CPU)
def test_metadata_say_method_parameters_and_library(name):
    metadata = json.loads(json.dumps(flow_method(name).metadata()))
    library = {"library": "opencv-contrib-python", "version": import_cv2().__version__}
    library = {"library": "flow.brox", "version": "1", "device": "cpu"} if name == "brox" else library
    assert metadata == {"method": name, "parameters": metadata["parameters"], **library}
    assert len(metadata["parameters"]) >= 7 or name == "deepflow"  # which has none that could be read


def test_wrong_input_is_refused():
    with pytest.raises(
        ValueError, match="method 'broxx' is unknown; there are farneback, dis, .*, nvof. Did you mean 'brox'"
    ):
        flow_method("broxx")
    grey = np.zeros((32, 32), np.uint8)
    for other in (np.zeros((32, 33), np.uint8), np.zeros((32, 32), np.float32), np.zeros((32, 32, 3), np.uint8)):
        with pytest.raises(ValueError, match="expected two uint8"):
            flow_method()(grey, other)


@pytest.mark.parametrize(
    "name, parameters",
    [
        ("farneback", {"winsize": 9}),
        ("dis", {"FinestScale": 0}),
        ("tvl1", {"WarpingsNumber": 2}),
        ("brox", {"gamma": 9}),
    ],
)
def test_a_parameter_can_be_set_and_is_recorded(name, parameters):
    changed = flow_method(name, parameters=parameters)
    assert changed.metadata()["parameters"] == flow_method(name).parameters | parameters
    pair = shifted_pair(3, 1)
    assert not np.array_equal(changed(*pair), flow_method(name)(*pair))


@pytest.mark.parametrize(
    "name, parameters, message",
    [
        ("brox", {"alhpa": 0.2}, "brox has no parameter 'alhpa'; .* Did you mean 'alpha'"),
        ("brox", {"inner_iterations": 2.5}, "brox: inner_iterations=2.5 is no int; the default is 5"),
        ("farneback", {"winsize": "wide"}, "farneback: winsize='wide' is no int"),
        ("dis", {"preset": "fast"}, "dis has no parameter 'preset'"),
        ("deepflow", {"alpha": 1.0}, "deepflow has no parameters that could be set; got alpha"),
    ],
)
def test_a_parameter_that_does_not_exist_or_fit_is_refused(name, parameters, message):
    with pytest.raises(ValueError, match=message):
        flow_method(name, parameters=parameters)


def test_a_method_runs_only_where_it_can():
    with pytest.raises(ValueError, match="dis runs on the CPU, not on 'cuda'; on a GPU run brox, nvof"):
        flow_method("dis", "cuda")
    with pytest.raises(ValueError, match="nvof is the flow engine of an NVIDIA GPU; there is none.*take dis or brox"):
        flow_method("nvof")
    for name in ("brox", "nvof"):
        with pytest.raises(ValueError, match=f"{name} is to run on 'cuda:99', but torch sees"):
            flow_method(name, "cuda:99")


def test_a_method_is_proven_before_it_is_relied_on():
    assert (
        prove_method("dis", parameters={"FinestScale": 0})
        == flow_method("dis", parameters={"FinestScale": 0}).metadata()
    )
    with pytest.raises(ValueError, match=r"brox cannot compute flow on 'cpu' with scale=1.5: .*scale in \[0.3, 0.99\]"):
        prove_method("brox", parameters={"scale": 1.5})
    with pytest.raises(ValueError, match="farneback cannot compute flow on 'cpu' with pyr_scale=2.0"):
        prove_method("farneback", parameters={"pyr_scale": 2.0})


def test_the_road_through_dali_keeps_pairs_and_channels_apart():
    """What surrounds the GPU's engine, around an operator of the CPU: vectors that are grey values of both frames."""
    pytest.importorskip("nvidia.dali")
    from nvidia.dali import fn, types

    from flow.nvof import NvofFlow

    def operator(pairs):
        both = fn.cast(pairs[:, :, :, 0:1], dtype=types.FLOAT)
        return fn.cat(both[1:2], both[0:1], axis=3)

    engine = NvofFlow(operator, None, 8)
    rng = np.random.default_rng(0)
    for num_pairs in (5, 8, 3):
        grey0, grey1 = rng.integers(0, 255, (2, num_pairs, 12, 17), np.uint8)
        # The engine's vectors lead from the second frame of a sequence to the first: ours begin at grey0.
        assert np.array_equal(engine(grey0, grey1), np.stack((grey0, grey1), 1))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["brox", "nvof"])
def test_a_constant_motion_is_found_on_the_gpu(name):
    pairs = [shifted_pair(2.5, -1.25), shifted_pair(-3, 1)]
    grey0, grey1 = (np.stack(frames) for frames in zip(*pairs, strict=True))
    method = flow_method(name, "cuda")
    fields = method.batch(grey0, grey1)
    for field, motion, pair in zip(fields, [(2.5, -1.25), (-3, 1)], pairs, strict=True):
        assert np.abs(np.median(field[:, 12:-12, 12:-12], axis=(1, 2)) - motion).max() < 0.25  # nvof counts in 1/32 px
        assert np.abs(method(*pair) - field).max() < 0.01


def end_point_errors(data, name):
    """Error in px of a method on each Middlebury pair."""
    method = flow_method(name)
    return [end_point_error(method(pair.grey0, pair.grey1), pair) for pair in read_pairs(data / "flow_gt")]


def test_the_default_is_the_better_of_the_fast_methods_on_real_pairs(real_data):
    dis, farneback = end_point_errors(real_data, "dis"), end_point_errors(real_data, "farneback")
    assert DEFAULT_METHOD == "dis"
    assert np.mean(dis) < 0.4 < np.mean(farneback)
    assert all(ours < theirs for ours, theirs in zip(dis, farneback, strict=True))
