"""The figures: the arrays behind the drawings, and that something is drawn."""

import json
import sys

import numpy as np
import pytest
import torch

from flow.canvas import to_svg
from flow.codec import decode_rgb
from loaders.index import open_index
from nets.cnn_m import CNNM
from train import figures, flow_figures
from train.checkpoint import Checkpoint, save_checkpoint
from train.results import confusion_matrix

VIDEO = "walk/wide"
CLASSES = ["jump", "run", "sit", "walk"]


def colors_of(vectors, max_px=1.0):
    """RGB (n, 3) of displacements (n, 2)."""
    return flow_figures.flow_colors(np.asarray(vectors, np.float32).T[:, :, None], max_px)[:, 0]


def circle(n=360, radius=1.0):
    angle = 2 * np.pi * np.arange(n) / n
    return radius * np.stack([np.cos(angle), np.sin(angle)], axis=1)


def saturation(rgb):
    return 1 - rgb.min(-1) / rgb.max(-1)


@pytest.fixture
def results_file(tmp_path):
    """results.json of 4 classes, the first without test videos, and the confusion in it."""
    labels = np.array([1, 1, 1, 1, 2, 2, 3])
    predicted = np.array([1, 1, 1, 0, 3, 3, 3])
    confusion = confusion_matrix(labels, predicted, 4)
    row = {"title": "Averaged", "accuracy_pct": 400 / 7, "num_videos": 7, "confusion": confusion.tolist()}
    path = tmp_path / "results.json"
    methods = {"spatial": row, "average": row}
    path.write_text(json.dumps({"classes": CLASSES, "split_list": "split1_test", "methods": methods}))
    return path, confusion


def write_checkpoint(run, stream="temporal", num_channels=6, **config):
    (run / stream).mkdir(parents=True)
    net = CNNM(num_channels, 4, width=0.1, input_px=64, second_lrn=False)
    save_checkpoint(Checkpoint(stream, 1, net.state_dict(), {}, config, "d"), run / stream / "checkpoint.pt")
    return net.features.conv1.weight.detach().numpy()


def assert_is_a_picture(path):
    """A decodable PNG, of some size, that is not blank."""
    assert path.read_bytes().startswith(b"\x89PNG")
    image = decode_rgb(path.read_bytes())  # OpenCV decodes PNG too
    assert min(image.shape[:2]) > 60
    assert (image != image[0, 0]).mean() > 0.01


# --- the colour wheel --------------------------------------------------------------------------------------------


def test_what_does_not_move_is_white():
    assert np.array_equal(colors_of([(0, 0)]), [[1, 1, 1]])


def test_hues_turn_as_in_the_definition():
    """To the right is red, and from there down, yellow, green, cyan, blue and magenta at their shares of 55."""
    share = np.array([0, 15, 21, 25, 36, 49]) / 55
    vectors = np.stack([np.cos(2 * np.pi * share), np.sin(2 * np.pi * share)], axis=1)
    pure = [(1, 0, 0), (1, 1, 0), (0, 1, 0), (0, 1, 1), (0, 0, 1), (1, 0, 1)]
    assert colors_of(0.999999 * vectors) == pytest.approx(np.array(pure), abs=1e-4)


def test_every_direction_has_a_color_of_its_own_and_neighbours_are_alike():
    rgb = colors_of(circle(radius=0.9))
    step = np.abs(rgb - np.roll(rgb, 1, axis=0)).max(1)
    assert 0 < step.min() and step.max() < 0.1  # also where the circle closes
    assert np.abs(rgb - np.roll(rgb, 180, axis=0)).max(1).min() > 0.3  # opposite directions
    assert len(np.unique(rgb.round(6), axis=0)) == 360


def test_saturation_grows_with_length():
    lengths = np.linspace(0, 1, 20)
    for direction in circle(12):
        values = saturation(colors_of(lengths[:, None] * direction * 0.999))
        assert (np.diff(values) > 0).all()
    assert colors_of(circle(radius=2), 4) == pytest.approx(colors_of(circle(radius=0.5), 1), abs=1e-6)


def test_what_is_off_the_scale_is_darkened():
    inside, outside = colors_of(circle(radius=0.9999)), colors_of(circle(radius=1.5))
    assert outside == pytest.approx(0.75 * inside, abs=1e-3)


def test_a_scale_of_nothing_is_refused():
    with pytest.raises(ValueError, match="max_px=0: .* positive"):
        colors_of([(1, 1)], 0)


# --- fields and frames -------------------------------------------------------------------------------------------


def test_fields_and_frames_are_those_that_were_packed(packed, arrays):
    index = open_index(packed)
    (row,) = index.rows([VIDEO])
    frames, fields, *_ = arrays[VIDEO]
    read = flow_figures.read_fields(index, row, 3, 5)
    assert read.shape == (5, *fields.shape[1:])
    others = [np.abs(read - fields[tau : tau + 5]).mean() for tau in range(len(fields) - 4)]
    assert others[3] < 0.05 and np.argmin(others) == 3
    assert np.abs(flow_figures.read_frames(index, row, 4, 2).astype(int) - frames[4:6]).mean() < 4


@pytest.mark.parametrize(("tau", "L"), [(-1, 1), (19, 1), (10, 10), (0, 20), (0, 0)])
def test_fields_outside_the_video_are_refused(packed, tau, L):
    index = open_index(packed)
    with pytest.raises(ValueError, match=f"{L} fields from frame {tau} on: {VIDEO} has 19, from frames 0 to 18"):
        flow_figures.read_fields(index, index.rows([VIDEO])[0], tau, L)


def test_the_busiest_box_is_where_motion_differs_from_the_camera_s():
    fields = np.full((2, 2, 60, 90), 5, np.float32)  # the camera pans
    fields[:, :, 31:41, 50:65] += 2
    x, y, w, h = flow_figures.busiest_box(fields)
    assert (w, h) == (30, 20)
    assert x <= 50 and x + w >= 65 and y <= 31 and y + h >= 41


# --- arrays behind figures 4 to 6 --------------------------------------------------------------------------------


@pytest.mark.parametrize("gap", [1, 3])
def test_column_j_row_c_of_the_sheet_is_channel_c_of_filter_j(gap):
    weights = np.random.default_rng(0).normal(size=(5, 4, 7, 7)).astype(np.float32)
    sheet = figures.filter_sheet(weights, gap)
    pitch = 7 + gap
    assert sheet.shape == (4 * pitch - gap, 5 * pitch - gap)
    for j, filter in enumerate(weights):
        for c, channel in enumerate(filter):
            tile = sheet[c * pitch : c * pitch + 7, j * pitch : j * pitch + 7]
            assert tile == pytest.approx(channel / np.abs(filter).max())
    assert np.isnan(sheet).sum() == sheet.size - weights.size


def test_a_filter_of_zeros_is_grey():
    assert (figures.filter_sheet(np.zeros((1, 2, 3, 3), np.float32), 1)[:3] == 0).all()


def test_channels_are_named_in_the_order_of_the_stack():
    forward = ["dx1", "dy1", "dx2", "dy2", "dx3", "dy3", "dx4", "dy4"]
    assert figures.channel_names("temporal", 8, {"data.bidirectional": False}) == forward
    both = figures.channel_names("temporal", 8, {"data.bidirectional": True})
    assert both == [*forward[:4], "bdx1", "bdy1", "bdx2", "bdy2"]
    assert figures.channel_names("spatial", 3, {}) == ["R", "G", "B"]
    assert figures.channel_names("spatial", 6, {}) == ["R1", "G1", "B1", "R2", "G2", "B2"]


def test_confusions_are_shares_of_the_true_class(results_file):
    path, confusion = results_file
    read, classes, caption = figures.read_confusion(path, "average")
    assert np.array_equal(read, confusion) and classes == CLASSES
    assert caption == "Averaged, split1_test: 57.1 % of 7 videos"
    shares = figures.confusion_shares(read)
    assert np.isnan(shares[0]).all()
    assert shares[1:].sum(1) == pytest.approx(np.ones(3))
    assert shares[1] == pytest.approx([0.25, 0.75, 0, 0])


def test_recalls_are_sorted_and_leave_out_classes_without_videos(results_file):
    assert figures.sorted_recalls(results_file[1], CLASSES) == [("walk", 1.0), ("run", 0.75), ("sit", 0.0)]


def test_a_run_folder_stands_for_its_results_and_one_stream_for_the_average(results_file):
    path, confusion = results_file
    assert np.array_equal(figures.read_confusion(path.parent, "spatial")[0], confusion)
    content = json.loads(path.read_text())
    del content["methods"]["average"]
    path.write_text(json.dumps(content))
    assert np.array_equal(figures.read_confusion(path, "average")[0], confusion)


# --- the command -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [["flow"], ["flow", "--frame", "3", "--box", "10", "12", "30", "20"], ["stacking"], ["stacking", "--L", "1"]],
    ids=" ".join,
)
def test_figures_of_packed_data_are_drawn(packed, tmp_path, arguments, capsys):
    out = tmp_path / "new" / "figure.png"
    name, *options = arguments
    figures.main([name, str(packed), VIDEO, *options, "--out", str(out)])
    assert capsys.readouterr().out.strip() == f"drew {out}"
    assert_is_a_picture(out)


@pytest.mark.parametrize(("stream", "num_channels"), [("temporal", 2), ("temporal", 20), ("spatial", 3)])
def test_filters_of_any_net_are_drawn(tmp_path, stream, num_channels):
    write_checkpoint(tmp_path, stream, num_channels)
    assert_is_a_picture(figures.draw_filters(tmp_path, tmp_path / "filters.png", stream=stream))


def test_every_weight_of_the_first_layer_is_a_block_of_equal_pixels(tmp_path):
    weights = write_checkpoint(tmp_path)
    image = decode_rgb(figures.draw_filters(tmp_path, tmp_path / "filters.png").read_bytes())[:, :, 0].astype(int)
    sheet = figures.filter_sheet(weights)
    expected = np.where(np.isnan(sheet), 255, np.round((np.nan_to_num(sheet) + 1) * 127.5)).astype(int)
    scale = round(0.3 * figures.DPI / 8)
    blocks = np.kron(expected, np.ones((scale, scale), int))
    height, width = blocks.shape
    far = min(
        np.abs(image[y : y + height, x : x + width] - blocks).max()
        for y in range(image.shape[0] - height + 1)
        for x in range(60, 90)
    )
    assert far <= 2


@pytest.mark.parametrize(
    ("name", "num_classes"), [("confusion", 4), ("confusion", 400), ("recall", 101), ("recall", 400)]
)
def test_results_of_any_number_of_classes_are_drawn(results_file, tmp_path, name, num_classes):
    path, _ = results_file
    content = json.loads(path.read_text())
    content["classes"] = [f"class{k}" for k in range(num_classes)]
    content["methods"]["average"]["confusion"] = np.eye(num_classes, dtype=int).tolist()
    path.write_text(json.dumps(content))
    figures.main([name, str(path), "--out", str(tmp_path / "f.png")])
    assert_is_a_picture(tmp_path / "f.png")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["flow", "PACKED", "run/none"], "holds no video 'run/none'"),
        (["flow", "PACKED", VIDEO, "--frame", "19"], "1 fields from frame 19 on: walk/wide has 19"),
        (["flow", "PACKED", VIDEO, "--box", "100", "0", "20", "20"], "box 100 0 20 20 .* leaves the frame of 113 x 64"),
        (["flow", "PACKED", VIDEO, "--box", "0", "0", "0", "20"], "box 0 0 0 20 .* leaves the frame"),
        (["flow", "PACKED", VIDEO, "--out", "figure.pdf"], "figure.pdf: figures are written as PNG"),
        (["stacking", "PACKED", "walk/short"], "10 fields from frame 0 on: walk/short has 3"),
        (["stacking", "TMP", VIDEO], "is no packed data set"),
        (["filters", "TMP"], "no checkpoint at .*temporal/checkpoint.pt"),
        (["confusion", "TMP"], "results.json"),
        (["recall", "RESULTS", "--method", "svm"], "has no method 'svm'; it has spatial, average"),
        (["recall", "OTHER"], "other.json is no results.json"),
    ],
)
def test_wrong_requests_are_named(packed, results_file, tmp_path, arguments, message):
    (tmp_path / "other.json").write_text('{"a": 1}')
    (tmp_path / "empty").mkdir()
    places = {
        "PACKED": packed,
        "TMP": tmp_path / "empty",
        "RESULTS": results_file[0],
        "OTHER": tmp_path / "other.json",
    }
    with pytest.raises(SystemExit, match=f"error: .*{message}"):
        figures.main([str(places.get(argument, argument)) for argument in arguments])


def test_a_first_layer_that_is_no_convolution_is_refused(tmp_path):
    (tmp_path / "temporal").mkdir()
    net = {"full.weight": torch.zeros(3, 4)}
    save_checkpoint(Checkpoint("temporal", 1, net, {}, {}, "d"), tmp_path / "temporal" / "checkpoint.pt")
    with pytest.raises(ValueError, match=r"full.weight is of shape \(3, 4\); filters are \(F, C, k, k\)"):
        figures.draw_filters(tmp_path, tmp_path / "f.png")


def test_without_matplotlib_the_message_says_what_to_install(results_file, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(SystemExit, match=r"figures need matplotlib.*pip install matplotlib"):
        figures.main(["recall", str(results_file[0]), "--out", str(tmp_path / "f.png")])


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("draw", [figures.confusion_figure, figures.recall_figure])
def test_long_names_of_classes_leave_the_figure_its_room(draw, tmp_path):
    classes = [f"{k} {'wide name ' * 7}" for k in range(6)]
    found = {"confusion": np.eye(6, dtype=int).tolist(), "accuracy_pct": 100.0, "num_videos": 6}
    content = {"classes": classes, "split_list": "split1_test", "methods": {"average": found}}
    (tmp_path / "results.json").write_text(json.dumps(content))
    figure = draw(tmp_path)
    to_svg(figure)
    labels = [tick.get_text() for axes in figure.axes for tick in axes.get_xticklabels()]
    assert any(label.startswith("0 wide name") and label.endswith("…") for label in labels)
