"""The paper's settings, written down once more, and every full-scale config held against them."""

import re

import pytest
import torch

from loaders.batch import StreamSpec
from loaders.views import VIEWS
from train import tables
from train.config import CONFIG_FOLDER, resolve_config, to_flat
from train.model import build_net, stream_spec
from train.tasks import read_class_list

UCF, HMDB, IMAGENET = "data/ucf101/packed", "data/hmdb51/packed", "data/imagenet/packed"

#: Sec. 5, for every net; all else of a config must be what is stated here or below.
COMMON = {
    "data.crop_px": 224,
    "data.L": 10,
    "data.stacking": "flow",
    "data.bidirectional": False,
    "data.rgb_frames": 1,
    "data.subtract_mean": True,
    "data.color_jitter": True,
    "data.random_mirror": True,
    "data.stacks_per_window": 1,
    "data.train_list": "",
    "data.split": "split1",
    "model.width": 1.0,
    "train.batch_size": 256,
    "train.momentum": 0.9,
    "train.weight_decay": 5e-4,
    "eval.num_taus": 25,
}
#: Sec. 5 and 6, for the stream that a config trains.
FROM_SCRATCH = {"lr": 1e-2, "steps": 80_000, "milestones": [50_000, 70_000], "dropout": 0.9, "init": "",
                "train_layers": "all", "extra_roots": [], "extra_lists": [], "extra_as": "tasks"}  # fmt: skip
TUNED = {"steps": 20_000, "milestones": [14_000]}
PRETRAINED = {**TUNED, "init": "runs/imagenet/spatial/checkpoint.pt"}
LAST = {**PRETRAINED, "train_layers": "last"}


def spatial(root=UCF, common=(), **stream):
    return "spatial", {**COMMON, "data.root": root, **dict(common)}, {**FROM_SCRATCH, **stream}


def temporal(root=UCF, common=(), **stream):
    return "temporal", {**COMMON, "data.root": root, **dict(common)}, {**FROM_SCRATCH, **stream}


#: config -> stream, what all sections but the stream's hold, and the stream's own
PAPER = {
    "imagenet": spatial(IMAGENET, {"eval.num_taus": 1}, dropout=0.5),
    "spatial_scratch_05": spatial(dropout=0.5),
    "spatial_scratch_09": spatial(),
    "spatial_finetune_05": spatial(**PRETRAINED, dropout=0.5),
    "spatial_finetune_09": spatial(**PRETRAINED),
    "spatial_last_05": spatial(**LAST, dropout=0.5),
    "spatial_last_09": spatial(**LAST),
    "slow_fusion": spatial(common={"data.rgb_frames": 11}),
    "flow_L1": temporal(common={"data.L": 1}),
    "flow_L5": temporal(common={"data.L": 5}),
    "flow_L10_nomean": temporal(common={"data.subtract_mean": False}),
    "flow_L10": temporal(),
    "trajectory_L10_nomean": temporal(common={"data.stacking": "trajectory", "data.subtract_mean": False}),
    "trajectory_L10": temporal(common={"data.stacking": "trajectory"}),
    "bidirectional_L10": temporal(common={"data.bidirectional": True}),
    "hmdb51_scratch": temporal(HMDB),
    "hmdb51_finetune": temporal(HMDB, **TUNED, init="runs/ucf101_all/temporal/checkpoint.pt"),
    "hmdb51_added_classes": temporal(
        HMDB, extra_roots=[UCF], extra_lists=["all"], extra_as="classes", extra_classes="ucf101_not_in_hmdb51"
    ),
    "hmdb51_multitask": temporal(HMDB, extra_roots=[UCF], extra_lists=["all"]),
    "ucf101_multitask": temporal(extra_roots=[HMDB], extra_lists=["all"]),
    "ucf101_all": temporal(common={"data.train_list": "all", "eval.num_taus": 0}),
    "hmdb51_spatial_last": spatial(HMDB, **LAST, dropout=0.5),
}


@pytest.mark.parametrize("name", PAPER)
def test_the_samples_of_every_config_are_the_papers(name):
    """What the loader is asked for, which tells rows of Table 1b apart that have nets of the same shape."""
    stream, common, _ = PAPER[name]
    keys = ("crop_px", "L", "stacking", "bidirectional", "rgb_frames", "subtract_mean", "color_jitter", "random_mirror")
    expected = StreamSpec(stream=stream, **{key: common[f"data.{key}"] for key in keys})
    assert stream_spec(resolve_config(name), stream) == expected


@pytest.mark.parametrize("name", PAPER)
def test_full_scale_configs_are_the_papers(name):
    stream, common, own = PAPER[name]
    flat = to_flat(resolve_config(name))
    expected = {**common, "train.streams": [stream], **{f"{stream}.{key}": value for key, value in own.items()}}
    assert {key: flat[key] for key in expected} == expected


def test_every_source_of_a_number_is_among_them():
    named = {config for table in tables.TABLES for cell in table.cells for config in tables.configs_of(cell.source)}
    assert named | set(tables.PRETRAINING) == set(PAPER)


@pytest.mark.parametrize("name", PAPER)
def test_headers_say_which_numbers_they_reproduce(name):
    lines = (CONFIG_FOLDER / f"{name}.yaml").read_text().splitlines()
    assert len(lines) <= 30
    header = re.sub(r"\n# *", " ", "\n".join(line for line in lines if line.startswith("#")))
    for word in ("Reproduces:", "Hardware:", "Time:", "Number:", "Command:"):
        assert word in header
    numbers = [cell.paper_pct for table in tables.TABLES for cell in table.cells if cell.source == name]
    assert numbers or name == "ucf101_all"
    for number in numbers:
        assert f"{number} %" in header


def test_a_test_video_has_250_views():
    assert COMMON["eval.num_taus"] * len(VIEWS) == 250


#: Fig. 1: kernels, outputs and inputs of the layers with weights, and the parameters at 101 classes.
LAYERS = [(96, 7), (256, 5), (512, 3), (512, 3), (512, 3), (4096,), (2048,), (101,)]


@pytest.mark.parametrize(
    ("name", "channels", "num_parameters"),
    [
        ("spatial_scratch_09", 3, 90_627_813),
        ("flow_L1", 2, 90_707_781 - 18 * 96 * 49),
        ("flow_L10", 20, 90_707_781),
        ("trajectory_L10", 20, 90_707_781),
        ("bidirectional_L10", 20, 90_707_781),
    ],
)
def test_the_nets_layers_are_those_of_figure_1(name, channels, num_parameters):
    net = build_net(resolve_config(name), PAPER[name][0], 101, torch.device("meta"))
    weights = [parameter.shape for parameter in net.parameters() if parameter.ndim > 1]
    assert [(shape[0], *shape[3:]) for shape in weights] == LAYERS
    assert weights[0][1] == channels
    assert sum(parameter.numel() for parameter in net.parameters()) == num_parameters


def test_the_same_run_has_the_same_number_everywhere():
    for splits in {table.splits for table in tables.TABLES}:
        numbers = {}
        for cell in (cell for table in tables.TABLES if table.splits == splits for cell in table.cells if cell.source):
            assert numbers.setdefault(cell.source, cell.paper_pct) == cell.paper_pct


def left_out():
    """Classes that the head of the list names as left out -> the HMDB-51 classes that they are."""
    lines = (CONFIG_FOLDER / "ucf101_not_in_hmdb51.txt").read_text().splitlines()
    found = [re.fullmatch(r"# +(\w+) +-> (.+)", line) for line in lines]
    return {match[1]: match[2].split(", ") for match in found if match}


def test_78_classes_are_added_and_23_are_not():
    added = read_class_list("ucf101_not_in_hmdb51")
    assert len(added) == len(set(added)) == 78
    assert len(left_out()) == 23 and not set(added) & set(left_out())


def test_added_and_left_out_classes_are_all_of_ucf101(real_data):
    index = (real_data / "ucf101_mini" / "splits" / "classInd.txt").read_text().split()
    assert sorted([*read_class_list("ucf101_not_in_hmdb51"), *left_out()]) == sorted(index[1::2])
    hmdb = {path.name.partition("_test_split")[0] for path in (real_data / "hmdb51_mini" / "splits").iterdir()}
    assert len(hmdb) == 51 and {name for names in left_out().values() for name in names} <= hmdb
