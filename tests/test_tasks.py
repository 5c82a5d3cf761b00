"""Several data sets: how a batch is shared, which outputs are whose, the loss, and whole runs."""

import json
from contextlib import ExitStack

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from loaders import dali_loader
from loaders.batch import StreamSpec
from loaders.index import open_index
from loaders.joint import JointLoader, Part, part_slots, share_batch
from tests.conftest import pack_arrays, random_video
from tests.test_engine import ALONE
from tests.tiny import tiny_config, tiny_overrides
from train import launch as train_launch
from train.checkpoint import load_checkpoint, save_checkpoint
from train.engine import check_stream, train_stream
from train.evaluate import scores_path
from train.log import read_log
from train.model import build_net, start_from
from train.scores import read_scores
from train.tasks import batch_shares, count_correct, open_tasks, tasks_loss

SPEC = StreamSpec(stream="temporal", L=3, crop_px=48)


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """A second packed set: two classes, one of them named as in the first."""
    rng = np.random.default_rng(11)
    videos = {f"{name}/{i}": random_video(rng, 8 + i, 64, 70) for name in ("climb", "sit") for i in range(3)}
    splits = {
        "split1_train": [video_id for video_id in videos if not video_id.endswith("2")],
        "split1_test": [video_id for video_id in videos if video_id.endswith("2")],
        "few": ["climb/0", "sit/1"],
    }
    return pack_arrays(tmp_path_factory.mktemp("other") / "set", videos, splits=splits)


def with_other(packed, other, name="split1_train", **changes):
    return tiny_config(packed, temporal__extra_roots=f"[{other}]", temporal__extra_lists=f"[{name}]", **changes)


# --- sharing a batch ---------------------------------------------------------------------------------------------


def test_shares_are_in_proportion_and_whole():
    assert share_batch([101, 51], 256) == [170, 86]
    assert share_batch([1, 1, 1], 256) == [86, 85, 85]
    assert share_batch([1000, 1], 8) == [7, 1]  # nobody is left out
    assert share_batch([1000, 1, 1], 4) == [2, 1, 1]
    assert share_batch([101, 51], 256, 16) == [176, 80]
    assert share_batch([7.5, 0.5, 2, 2], 64) == [40, 3, 11, 10]
    for weights in ([3, 5], [1, 2, 4], [7.5, 0.5, 2, 2]):
        for unit in (1, 4):
            shares = share_batch(weights, 64, unit)
            assert sum(shares) == 64 and all(share % unit == 0 and share > 0 for share in shares)
    with pytest.raises(ValueError, match="global batch of 2 cannot hold 1 or more samples of each of 3 data sets"):
        share_batch([1, 1, 1], 2)


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_the_ranks_slots_make_up_every_share_once(world_size):
    shares = [5, 1, 10]
    slots = [part_slots(shares, rank, world_size) for rank in range(world_size)]
    for number, share in enumerate(shares):
        held = [slot for own in slots for slot in range(*own[number])]
        assert held == list(range(share))
    assert {sum(end - begin for begin, end in own) for own in slots} == {16 // world_size}
    if world_size == 4:
        assert slots[0][1] == (0, 0) and slots[2][0] == (5, 5)  # a rank without samples of a set


@pytest.mark.parametrize(("share", "expected"), [("classes", [5, 3]), ("videos", [6, 2]), ("equal", [4, 4])])
def test_a_batch_is_shared_by_classes_videos_or_equally(packed, other, share, expected):
    """3 and 2 classes; 6 and 2 training videos."""
    config = with_other(packed, other, "few", temporal__batch_share=share)
    tasks = open_tasks(config, "temporal", open_index(packed))
    assert batch_shares(tasks, config, "temporal", SPEC) == expected


def test_a_joint_batch_holds_each_sets_own_batches(packed, other):
    first, second = open_index(packed), open_index(other)

    def loader(index, seed, slots):
        rows = index.split("split1_train")
        return dali_loader.train_loader(index, rows, SPEC, seed=seed, batch_size=8, slots=slots)

    opened = ExitStack()
    loaders = [opened.enter_context(loader(*of)) for of in ((first, 1, (2, 7)), (second, 2, (0, 3)))]
    parts = [Part(loaders[0], 0, np.arange(3)), Part(loaders[1], 1, np.array([5, 9]))]
    with JointLoader(parts, opened) as joint:
        batches = [next(joint) for _ in range(3)]
    with loader(first, 1, (0, 8)) as one, loader(second, 2, (0, 8)) as two:
        for batch in batches:
            a, b = next(one), next(two)
            assert torch.equal(batch.inputs, torch.cat([a.inputs[2:7], b.inputs[:3]]))
            assert batch.task.tolist() == [0] * 5 + [1] * 3
            assert batch.labels.tolist() == [*a.labels[2:7].tolist(), *[[5, 9][k] for k in b.labels[:3].tolist()]]


# --- outputs and loss --------------------------------------------------------------------------------------------


def test_the_loss_is_the_sum_of_each_tasks_mean():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(8, 5, generator=generator, requires_grad=True)
    task = torch.tensor([0, 0, 0, 0, 0, 1, 1, 1])
    labels = torch.tensor([0, 1, 2, 1, 0, 1, 0, 1])
    loss = tasks_loss(logits, labels, task, [3, 2], [5, 3], world_size=1)
    expected = F.cross_entropy(logits[:5, :3], labels[:5]) + F.cross_entropy(logits[5:, 3:], labels[5:])
    torch.testing.assert_close(loss, expected)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert (gradient[:5, 3:] == 0).all() and (gradient[5:, :3] == 0).all()  # each loss over its own videos

    halves = [slice(0, 4), slice(4, 8)]  # the first rank has none of task 1
    parts = [tasks_loss(logits[h], labels[h], task[h], [3, 2], [5, 3], world_size=2) for h in halves]
    torch.testing.assert_close((parts[0] + parts[1]) / 2, expected)
    of_ranks = [torch.autograd.grad(part, logits, retain_graph=True)[0] for part in parts]
    torch.testing.assert_close((of_ranks[0] + of_ranks[1]) / 2, gradient)


def test_a_sample_is_right_if_the_highest_of_its_own_tasks_outputs_is_its_label():
    logits = torch.tensor(
        [
            [9.0, 0, 0, 0, 0],  # task 0, label 0: right
            [0.0, 1, 0, 9, 0],  # task 0, label 1: right, the other task's output is higher
            [0.0, 0, 1, 9, 0],  # task 0, label 0: wrong, though its own label is the highest of task 1
            [9.0, 0, 0, 0, 1],  # task 1, label 1: right
            [9.0, 0, 0, 1, 0],  # task 1, label 1: wrong
        ]
    )
    task, labels = torch.tensor([0, 0, 0, 1, 1]), torch.tensor([0, 1, 0, 1, 1])
    assert count_correct(logits, labels, task, [3, 2]).item() == 3
    assert count_correct(logits[:3], labels[:3], None, [5]).item() == 1  # one softmax layer over all


def test_added_classes_follow_the_sets_own(packed, other, tmp_path):
    config = with_other(packed, other, "all", temporal__extra_as="classes")
    tasks = open_tasks(config, "temporal", open_index(packed))
    assert tasks.num_outputs == [5] and tasks.sets[1].label_map.tolist() == [3, 4]
    assert len(tasks.sets[1].rows) == 6  # all splits combined

    names = tmp_path / "some.txt"
    names.write_text("# sit is in both\nclimb  # this one\n")
    config = with_other(packed, other, "all", temporal__extra_as="classes", temporal__extra_classes=str(names))
    tasks = open_tasks(config, "temporal", open_index(packed))
    assert tasks.num_outputs == [4] and tasks.sets[1].label_map.tolist() == [3, -1]
    assert len(tasks.sets[1].rows) == 3

    names.write_text("fly\n")
    with pytest.raises(ValueError, match="has no class 'fly', one of 1"):
        open_tasks(config, "temporal", open_index(packed))
    config = with_other(packed, other, "all", temporal__extra_as="classes", temporal__extra_classes="no_such_list")
    with pytest.raises(ValueError, match="'no_such_list': no such list; known are .*ucf101_not_in_hmdb51"):
        open_tasks(config, "temporal", open_index(packed))


def test_test_videos_are_not_trained_on(packed):
    config = tiny_config(packed, data__train_list="all")
    with pytest.raises(ValueError, match="6 videos of split1_test, as .*, are trained on too, in .*: that is no test"):
        check_stream(config, "temporal", open_index(packed), [1])
    untested = tiny_config(packed, data__train_list="all", eval__num_taus=0, eval__num_taus_train=0)
    check_stream(untested, "temporal", open_index(packed), [1])


@pytest.mark.parametrize("extra_as", ["tasks", "classes"])
def test_test_videos_do_not_come_back_in_another_set(other, tmp_path, extra_as):
    """The set itself, or the same videos in other shards."""
    rng = np.random.default_rng(5)
    videos = {f"{name}/{i}": random_video(rng, 8, 64, 70) for name in ("climb", "sit") for i in range(3)}
    again = pack_arrays(tmp_path / "again", videos)
    for extra in (other, again):
        config = with_other(other, extra, "all", temporal__extra_as=extra_as)
        with pytest.raises(ValueError, match="2 videos of split1_test, as climb/2, are trained on too, in"):
            check_stream(config, "temporal", open_index(other), [1])
    check_stream(
        with_other(other, other, "split1_train", temporal__extra_as=extra_as), "temporal", open_index(other), [1]
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temporal__extra_roots": "[a]"}, r"extra_roots=\['a'\] and extra_lists=\[\]: each data set needs its list"),
        ({"spatial__train_layers": "last"}, "train_layers=last trains on top of a trained net: give its checkpoint"),
        ({"data__rgb_frames": 5}, "data.rgb_frames=5: 1, or 11"),
    ],
)
def test_contradictory_configs_are_refused(packed, changes, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(packed, **changes)


# --- beginning with another net ----------------------------------------------------------------------------------


def test_a_net_begins_with_anothers_trunk_and_its_own_last_layer(packed, other, tmp_path):
    config = tiny_config(other, temporal__steps=2, train__seed=5)
    train_stream(config, "temporal", open_index(other), tmp_path / "first", ALONE)
    path = tmp_path / "first" / "checkpoint.pt"
    trained = load_checkpoint(path).net
    net = build_net(tiny_config(packed), "temporal", 3, ALONE.device)
    fresh = {name: value.clone() for name, value in net.state_dict().items()}
    start_from(net, str(path))
    for name, value in net.state_dict().items():
        assert torch.equal(value, (fresh if name.startswith("scores.") else trained)[name]), name
    assert not torch.equal(fresh["features.conv1.weight"], trained["features.conv1.weight"])
    wider = tiny_config(packed, data__L=5, temporal__init=str(path))
    with pytest.raises(ValueError, match=r"features.conv1.weight has shape \(3, 6, 7, 7\) there and \(3, 10, 7, 7\)"):
        check_stream(wider, "temporal", open_index(packed), [1])


def test_a_net_that_has_seen_the_test_or_is_unfinished_is_no_beginning(other, tmp_path):
    untested = {"eval__num_taus": 0, "eval__num_taus_train": 0}
    seen = tiny_config(other, data__train_list="all", temporal__steps=2, **untested)
    train_stream(seen, "temporal", open_index(other), tmp_path / "seen", ALONE)
    config = tiny_config(other, temporal__init=tmp_path / "seen" / "checkpoint.pt")
    with pytest.raises(ValueError, match="2 videos of split1_test, as climb/2, are trained on too"):
        check_stream(config, "temporal", open_index(other), [1])
    check_stream(config, "temporal", open_index(other), [1], folder=tmp_path / "seen")  # goes on from its own weights

    path = tmp_path / "seen" / "checkpoint.pt"
    checkpoint = load_checkpoint(path)
    checkpoint.config["temporal.steps"] = 7
    save_checkpoint(checkpoint, path)
    with pytest.raises(ValueError, match="init=.* was stopped at step 2 of 7; finish that run first"):
        check_stream(config, "temporal", open_index(other), [1])
    path.unlink()
    with pytest.raises(FileNotFoundError, match="init=.*: no such checkpoint. Run the config that makes it"):
        check_stream(config, "temporal", open_index(other), [1])


def test_another_choice_of_added_classes_is_another_run(packed, other, tmp_path):
    names = tmp_path / "some.txt"
    names.write_text("climb\n")
    changes = dict(temporal__extra_as="classes", temporal__extra_classes=str(names), temporal__steps=2)
    config = with_other(packed, other, "all", **changes)
    train_stream(config, "temporal", open_index(packed), tmp_path / "run", ALONE)
    names.write_text("sit\n")
    with pytest.raises(ValueError, match="was trained on data set .*, not on .*, which data.root and extra_roots hold"):
        train_stream(config, "temporal", open_index(packed), tmp_path / "run", ALONE)


def test_only_the_last_layer_learns_if_asked_for(packed, tmp_path):
    train_stream(tiny_config(packed, temporal__steps=2), "temporal", open_index(packed), tmp_path / "first", ALONE)
    before = load_checkpoint(tmp_path / "first" / "checkpoint.pt").net
    changes = {"temporal__init": tmp_path / "first" / "checkpoint.pt", "temporal__train_layers": "last"}
    config = tiny_config(packed, temporal__steps=4, **changes)
    train_stream(config, "temporal", open_index(packed), tmp_path / "second", ALONE)
    after = load_checkpoint(tmp_path / "second" / "checkpoint.pt")
    for name, value in after.net.items():
        assert torch.equal(value, before[name]) == (not name.startswith("scores.")), name
    assert len(after.optimizer["state"]) == 2  # momentum of the last layer's weight and bias alone


# --- whole runs --------------------------------------------------------------------------------------------------


@pytest.mark.dist
def test_a_run_of_two_tasks_is_the_same_on_two_processes(packed, other, tmp_path, capfd):
    """5 of 8 samples are of the first set, 3 of the second: the first process of two never sees the second set."""
    for num_procs in (1, 2):
        changes = dict(train__streams="[temporal]", temporal__steps=6, eval__num_taus=2, eval__num_taus_train=0)
        shares = dict(temporal__extra_roots=f"[{other}]", temporal__extra_lists="[split1_train]")
        run = ["--run", str(tmp_path / str(num_procs)), "--procs", str(num_procs)]
        train_launch.main([*run, *tiny_overrides(packed, **changes, **shares)])
    logs = [[record["loss"] for record in read_log(tmp_path / n / "temporal" / "log.jsonl")] for n in "12"]
    np.testing.assert_allclose(*logs, rtol=1e-4)
    assert logs[0][0] > 1.2  # two losses: chance alone is log 3 + log 2
    for task, num_classes, num_videos in ((0, 3, 6), (1, 2, 2)):
        one, two = (read_scores(scores_path(tmp_path / n, "temporal", "test", task)) for n in "12")
        assert one.scores.shape == (num_videos, num_classes)
        np.testing.assert_allclose(one.scores, two.scores, atol=1e-4)
        np.testing.assert_allclose(one.scores.sum(1), 1)
    assert json.loads((tmp_path / "1" / "temporal" / "task1" / "results.json").read_text())["classes"] == [
        "climb",
        "sit",
    ]
    assert "split1_test, 2 videos, 2 classes" in capfd.readouterr().out


def test_added_classes_are_trained_on_and_not_scored(packed, other, tmp_path):
    config = with_other(packed, other, "all", temporal__extra_as="classes")
    folder = tmp_path / "run" / "temporal"
    train_stream(config, "temporal", open_index(packed), folder, ALONE)
    assert load_checkpoint(folder / "checkpoint.pt").net["scores.weight"].shape[0] == 5
    from train.evaluate import evaluate_stream

    evaluate_stream(config, "temporal", open_index(packed), tmp_path / "run", ALONE)
    scores = read_scores(scores_path(tmp_path / "run", "temporal", "test")).scores
    assert scores.shape == (6, 3)
    np.testing.assert_allclose(scores.sum(1), 1)


def test_a_resumed_run_of_two_tasks_goes_on_as_if_not_stopped(packed, other, tmp_path):
    config = with_other(packed, other, temporal__steps=6)
    index = open_index(packed)
    train_stream(config, "temporal", index, tmp_path / "whole", ALONE)
    stopped = with_other(packed, other, temporal__steps=4)
    train_stream(stopped, "temporal", index, tmp_path / "parts", ALONE)
    train_stream(config, "temporal", index, tmp_path / "parts", ALONE)
    whole, parts = (load_checkpoint(tmp_path / name / "checkpoint.pt").net for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
