"""flow.brox: finds known motion, agrees with OpenCV's minimiser of the same kind of energy, and minimises its own."""

import numpy as np
import pytest
import torch
from test_extract import end_point_errors

from flow.brox import _Solver, brox_flow, pyramid_sizes
from flow.extract import flow_method


def texture(x, y, rng):
    """A band-limited function of the plane, in grey values, exact at any sub-pixel position."""
    total = np.zeros_like(x)
    for _ in range(60):
        length, angle, phase = rng.uniform(6, 40), *rng.uniform(0, 2 * np.pi, 2)
        total += np.sin(2 * np.pi / length * (x * np.cos(angle) + y * np.sin(angle)) + phase)
    return 128 + 8 * total


def turning_pair(height=96, width=129, degrees=1.5, zoom=1.02, shift=(1.3, -0.7)):
    """Two frames (H, W) uint8 of a plane that turns, grows and shifts, and the exact field (2, H, W)."""
    x, y = np.meshgrid(np.arange(width) - width / 2, np.arange(height) - height / 2)
    angle = np.deg2rad(degrees)
    matrix = zoom * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    moved = np.einsum("ij,jhw->ihw", matrix, [x, y]) + np.reshape(shift, (2, 1, 1))
    before = np.einsum("ij,jhw->ihw", np.linalg.inv(matrix), [x - shift[0], y - shift[1]])
    frames = [texture(*at, np.random.default_rng(5)) for at in ((x, y), before)]
    return *(np.clip(frame, 0, 255).round().astype(np.uint8) for frame in frames), moved - [x, y]


def run(grey0, grey1, **parameters):
    """Fields (N, 2, H, W) of frames (N, H, W) as numpy arrays, or one of one pair (H, W)."""
    single = grey0.ndim == 2
    frames = [torch.from_numpy(np.ascontiguousarray(grey[None] if single else grey)) for grey in (grey0, grey1)]
    fields = brox_flow(*frames, **parameters).numpy()
    return fields[0] if single else fields


def end_point_error(field, truth, border=0):
    inside = (slice(None), slice(border, truth.shape[1] - border), slice(border, truth.shape[2] - border))
    return np.hypot(*(field - truth)[inside]).mean()


def energy(grey0, grey1, field, alpha=0.197, gamma=50.0, eps=1e-3):
    """The energy of Brox et al. 2004, eq. (4)-(6), discretised independently: nothing of it is linearised."""
    import cv2

    frame0, frame1 = (cv2.GaussianBlur(grey.astype(np.float32) / 255, (0, 0), 0.6) for grey in (grey0, grey1))
    x, y = np.meshgrid(np.arange(frame0.shape[1], dtype=np.float32), np.arange(frame0.shape[0], dtype=np.float32))
    at = (x + field[0], y + field[1])

    def differences(image):
        return cv2.remap(image, *at, cv2.INTER_CUBIC, borderMode=cv2.BORDER_REPLICATE)

    data = (differences(frame1) - frame0) ** 2
    for derivative1, derivative0 in zip(np.gradient(frame1), np.gradient(frame0), strict=True):
        data += gamma * (differences(derivative1) - derivative0) ** 2
    smooth = sum(slope**2 for component in field for slope in np.gradient(component))
    inner = (slice(8, -8), slice(8, -8))
    return np.sqrt(data + eps**2)[inner].sum() + alpha * np.sqrt(smooth + eps**2)[inner].sum()


def test_a_known_sub_pixel_motion_is_found():
    grey0, grey1, truth = turning_pair()
    field = run(grey0, grey1)
    assert field.shape == truth.shape and field.dtype == np.float32
    error = end_point_error(field, truth, border=6)
    assert error < 0.06
    assert 20 * error < end_point_error(np.zeros_like(truth), truth, border=6)
    assert error < end_point_error(flow_method("dis")(grey0, grey1), truth, border=6)


def test_it_agrees_with_deepflow():
    grey0, grey1, truth = turning_pair()
    brox, deepflow = run(grey0, grey1), flow_method("deepflow")(grey0, grey1)
    assert end_point_error(brox, deepflow, border=6) < 0.08
    assert end_point_error(brox, truth, border=6) < end_point_error(deepflow, truth, border=6) + 0.04


def test_its_own_energy_is_lower_at_its_field_than_elsewhere():
    grey0, grey1, _ = turning_pair()
    field = run(grey0, grey1)
    lowest = energy(grey0, grey1, field)
    rng = np.random.default_rng(0)
    others = [flow_method(name)(grey0, grey1) for name in ("dis", "farneback")]
    others += [field + np.reshape(offset, (2, 1, 1)) for offset in ((0.05, 0), (0, 0.05), (-0.05, 0), (0, -0.05))]
    others += [field * 1.02, field + rng.normal(0, 0.01, field.shape)]
    assert all(lowest < energy(grey0, grey1, np.float32(other)) for other in others)


def test_the_mirrored_pair_has_the_mirrored_field():
    grey0, grey1, _ = turning_pair()
    field = run(grey0, grey1)
    mirrored = run(grey0[:, ::-1], grey1[:, ::-1])[:, :, ::-1]
    assert end_point_error(mirrored * np.reshape((-1, 1), (2, 1, 1)), field) < 0.01
    assert end_point_error(mirrored, field) > 0.5


def test_a_batch_is_its_pairs():
    pairs = [turning_pair(shift=shift)[:2] for shift in ((1, 0), (-2, 0.5), (0, 3))]
    grey0, grey1 = (np.stack(frames) for frames in zip(*pairs, strict=True))
    fields = run(grey0, grey1)
    for field, pair in zip(fields, pairs, strict=True):
        assert np.abs(field - run(*pair)).max() < 1e-3


@pytest.mark.parametrize("size", [(16, 16), (17, 40), (5, 31), (2, 3)])
def test_frames_may_be_small_and_odd(size):
    rng = np.random.default_rng(0)
    grey = rng.integers(0, 255, size, np.uint8)
    field = run(grey, grey)
    assert field.shape == (2, *size) and np.abs(field).max() < 1e-3


def test_frames_without_texture_do_not_move():
    flat = np.full((40, 50), 77, np.uint8)
    assert np.abs(run(flat, flat)).max() < 1e-6


def test_no_value_is_read_and_all_is_on_the_device():
    """A meta tensor has no values: reading one, or mixing in a tensor of the CPU, raises."""
    frames = torch.empty(3, 33, 40, dtype=torch.uint8, device="meta")
    fields = brox_flow(frames, frames, outer_iterations=2, inner_iterations=1, solver_iterations=1)
    assert fields.device.type == "meta" and fields.shape == (3, 2, 33, 40)


@pytest.mark.parametrize("height, width", [(4, 6), (5, 7)])
def test_the_sweeps_solve_the_linear_system(height, width):
    rng = np.random.default_rng(1)
    count = height * width
    root = rng.normal(size=(count, 2, 2))
    blocks = root @ root.transpose(0, 2, 1) + 0.1 * np.eye(2)  # a11, a12, a22 of each pixel
    left, up = rng.uniform(0.1, 1, (height, width - 1)), rng.uniform(0.1, 1, (height - 1, width))
    right = rng.normal(size=(count, 2))
    matrix = np.zeros((count, 2, count, 2))
    for i in range(count):
        matrix[i, :, i] += blocks[i]
        y, x = divmod(i, width)
        for j, weight in [(i - 1, left[y, x - 1])] * (x > 0) + [(i - width, up[y - 1, x])] * (y > 0):
            for one, other in ((i, j), (j, i)):
                matrix[one, :, one] += weight * np.eye(2)
                matrix[one, :, other] -= weight * np.eye(2)
    solution = np.linalg.solve(matrix.reshape(2 * count, -1), right.ravel()).reshape(height, width, 2)

    def tensor(values, *shape):
        return torch.tensor(np.ascontiguousarray(values), dtype=torch.float32).reshape(shape)

    data = tensor(blocks[:, [0, 0, 1], [0, 1, 1]].T, 3, 1, height, width)
    solver = _Solver(tensor(rng.normal(size=(2, count)), 1, 2, height, width))
    args = data, tensor(right.T, 2, 1, height, width), tensor(left, 1, height, -1), tensor(up, 1, -1, width)
    early, late = (solver.run(*args, num_sweeps)[0].permute(1, 2, 0).clone().numpy() for num_sweeps in (1, 600))
    assert np.abs(late - solution).max() < 1e-4 < np.abs(early - solution).max()


def test_pyramids_end_at_16_px_or_at_the_asked_number_of_levels():
    sizes = pyramid_sizes(256, 341, 0.8, 150)
    assert sizes[0] == (256, 341) and min(sizes[-1]) >= 16 and round(256 * 0.8 ** len(sizes)) < 16
    assert pyramid_sizes(256, 341, 0.8, 3) == [(256, 341), (205, 273), (164, 218)]


@pytest.mark.parametrize(
    "parameters", [{"alpha": 0}, {"gamma": -1}, {"scale": 1}, {"inner_iterations": 0}, {"sigma": -0.1}]
)
def test_parameters_that_make_no_sense_are_refused(parameters):
    with pytest.raises(ValueError, match=f"{next(iter(parameters))}={next(iter(parameters.values()))}.*expected alpha"):
        run(np.zeros((20, 20), np.uint8), np.zeros((20, 20), np.uint8), **parameters)


def test_real_pairs_with_known_motion(real_data):
    """Middlebury: at the paper's defaults no worse than DIS on five of six, and no worse than DeepFlow + 0.02 px."""
    brox, dis, deepflow = (end_point_errors(real_data, name) for name in ("brox", "dis", "deepflow"))
    assert sum(ours <= theirs for ours, theirs in zip(brox, dis, strict=True)) >= 5
    assert np.mean(brox) <= np.mean(deepflow) + 0.02


@pytest.mark.gpu
def test_the_gpu_computes_what_the_cpu_computes():
    grey0, grey1, truth = turning_pair()
    on_cpu, on_gpu = (flow_method("brox", device)(grey0, grey1) for device in ("cpu", "cuda"))
    frames = [torch.from_numpy(grey)[None].cuda() for grey in (grey0, grey1)]
    torch.cuda.set_sync_debug_mode("error")  # whatever waits for the device raises
    try:
        brox_flow(*frames)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert np.abs(on_cpu - on_gpu).mean() < 0.002
    assert end_point_error(on_gpu, truth, border=6) < 0.06
