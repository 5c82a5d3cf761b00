"""A run that takes a second: nets of a 32nd of their width on 48-px crops."""

import numpy as np
import torch

from train.config import resolve_config

torch.set_num_threads(1)  # nets this small gain nothing from more, and lose much on a busy machine

TINY = {
    "data.L": 3,
    "data.crop_px": 48,
    "model.width": 0.03125,
    "spatial.steps": 10,
    "temporal.steps": 10,
    "spatial.milestones": [6],
    "temporal.milestones": [6],
    "train.batch_size": 8,
    "train.log_every": 1,
    "train.checkpoint_every": 4,
    "eval.num_taus_train": 2,
}


def tiny_overrides(root, **changes):
    """key=value strings; changes are written section__key=value."""
    values = {**TINY, "data.root": str(root), **{key.replace("__", "."): value for key, value in changes.items()}}
    return [f"{key}={value}" for key, value in values.items()]


def tiny_config(root, **changes):
    return resolve_config("demo", tiny_overrides(root, **changes))


def made_run(root, run, streams=("spatial", "temporal"), classes=None, video_ids=None, **changes):
    """The files of a finished run, without training: made-up logs and scores, untrained nets. Returns its folder.

    classes, video_ids: names to put in the place of those of the packed set; ids of the test list.
    """
    from loaders.index import open_index
    from train.checkpoint import Checkpoint, save_checkpoint
    from train.config import to_flat, write_config
    from train.fuse import fuse_runs
    from train.log import TrainLog
    from train.model import build_net
    from train.origin import write_origin
    from train.results import write_results
    from train.scores import Scores, write_scores

    config, index = tiny_config(root, train__streams=f"[{', '.join(streams)}]", **changes), open_index(root)
    run.mkdir(parents=True)
    write_config(config, run / "config.yaml")
    write_origin(run, index)
    rng = np.random.default_rng(5)
    for stream in streams:
        net = build_net(config, stream, len(index.classes), torch.device("cpu"))
        (run / stream).mkdir()
        save_checkpoint(
            Checkpoint(stream, 10, net.state_dict(), {}, to_flat(config), index.fingerprint),
            run / stream / "checkpoint.pt",
        )
        with TrainLog(run / stream, 0) as log:
            for step in range(1, 11):
                rates = {"samples_per_s": 100 + 10 * rng.random(), "data_wait_pct": 9 * rng.random()}
                log.write({"step": step, "loss": 2 / step, "accuracy_pct": 9.0 * step, "lr": 0.1**step, **rates})
        for part in ("test", "train"):
            rows = index.split(f"split1_{part}")
            scores = rng.dirichlet(np.ones(len(index.classes)), len(rows))
            scores[0] = np.eye(len(index.classes))[index.labels[rows[0]]]  # one that is right
            scored = Scores(
                video_ids=np.array(video_ids if video_ids and part == "test" else index.video_ids(rows)),
                labels=index.labels[rows],
                scores=scores,
                num_views=np.full(len(rows), 250),
                classes=np.array(classes or index.classes),
                stream=stream,
                split_list=f"split1_{part}",
                dataset=index.fingerprint,
                checkpoint=f"of {stream}",
            )
            write_scores(scored, run / stream / f"scores_{part}.npz")
    write_results(fuse_runs([run], config.fuse), run)
    return run
