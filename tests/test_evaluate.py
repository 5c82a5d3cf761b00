"""Video scores: every listed video once, from 250 views, whatever the batch size."""

import numpy as np
import pytest
import torch

from loaders.index import open_index
from tests.tiny import tiny_config
from train import evaluate
from train.checkpoint import Checkpoint, save_checkpoint
from train.dist import World
from train.engine import loader_module
from train.evaluate import evaluate_stream, scores_path
from train.model import build_net, stream_spec
from train.scores import read_scores

ALONE = World(rank=0, world_size=1, device=torch.device("cpu"), num_threads=2)


def save_net(config, stream, index, run, step=1):
    (run / stream).mkdir(parents=True, exist_ok=True)
    net = build_net(config, stream, len(index.classes), ALONE.device)
    save_checkpoint(
        Checkpoint(stream, step, net.state_dict(), {}, {}, index.fingerprint), run / stream / "checkpoint.pt"
    )
    return net


@pytest.mark.parametrize("stream", ["spatial", "temporal"])
def test_every_listed_video_is_scored_from_250_views(packed, tmp_path, stream):
    config, index = tiny_config(packed), open_index(packed)
    save_net(config, stream, index, tmp_path)
    evaluate_stream(config, stream, index, tmp_path, ALONE)
    for part, num_views in (("test", 250), ("train", 20)):
        scores = read_scores(scores_path(tmp_path, stream, part))
        rows = index.split(f"split1_{part}")
        assert scores.video_ids.tolist() == index.video_ids(rows)
        assert scores.labels.tolist() == index.labels[rows].tolist()
        assert scores.num_views.tolist() == [num_views] * len(rows)
        assert scores.scores.sum(1) == pytest.approx(np.ones(len(rows)))
        assert (scores.stream, scores.split_list, scores.dataset) == (stream, f"split1_{part}", index.fingerprint)


def test_a_score_is_the_mean_softmax_over_the_views(packed, tmp_path):
    """Batches of 7 do not divide 6 videos x 3 taus: padding must not count."""
    config, index = tiny_config(packed, eval__num_taus=3, eval__batch_size=7), open_index(packed)
    net = save_net(config, "temporal", index, tmp_path).eval()
    rows = index.split("split1_test")
    scores, num_views = evaluate.score_videos(net, config, "temporal", index, rows, 3, ALONE, slice(0, 3))
    expected = {row: [] for row in rows}
    loader = loader_module(config).view_loader(index, rows, stream_spec(config, "temporal"), num_taus=3, batch_size=1)
    with loader, torch.inference_mode():
        for batch in loader:
            expected[batch.draw.video[0]].append(net(batch.inputs).double().softmax(1)[0].numpy())
    assert [len(expected[row]) for row in rows] == [30] * len(rows) == num_views.tolist()
    np.testing.assert_allclose(scores, [np.mean(expected[row], 0) for row in rows], atol=1e-6)


def test_scores_are_kept_until_the_checkpoint_changes(packed, tmp_path):
    options = {"eval__num_taus": 1, "eval__num_taus_train": 1, "data__loader": "reference"}
    config, index = tiny_config(packed, **options), open_index(packed)
    save_net(config, "spatial", index, tmp_path)
    path = scores_path(tmp_path, "spatial", "test")

    def written(**options):
        evaluate_stream(config, "spatial", index, tmp_path, ALONE, **options)
        return path.stat().st_mtime_ns, read_scores(path).checkpoint

    first = written()
    assert written() == first
    assert written(force=True)[0] > first[0]
    path.write_bytes(b"damaged")
    assert written()[1] == first[1]
    save_net(config, "spatial", index, tmp_path, step=2)
    assert written()[1] != first[1]


def test_a_video_that_a_list_names_twice_is_noticed(packed):
    config, index = tiny_config(packed), open_index(packed)
    net = build_net(config, "spatial", 3, ALONE.device)
    rows = index.split("split1_test")[[0, 1, 1]]
    with pytest.raises(RuntimeError, match="2 videos were not scored from 10 views.*twice"):
        evaluate.score_videos(net, config, "spatial", index, rows, 1, ALONE, slice(0, 3))


def test_evaluation_without_training_is_an_error(packed, tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint at .*train this stream first"):
        evaluate_stream(tiny_config(packed), "spatial", open_index(packed), tmp_path, ALONE)


def test_a_checkpoint_of_another_net_is_named(packed, tmp_path):
    index = open_index(packed)
    save_net(tiny_config(packed), "spatial", index, tmp_path)
    with pytest.raises(ValueError, match="checkpoint.pt is of another net than this config's"):
        evaluate_stream(tiny_config(packed, model__width=0.0625), "spatial", index, tmp_path, ALONE)
