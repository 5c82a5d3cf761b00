"""One process and two gloo processes: the same batches, masks, losses and scores."""

import numpy as np
import pytest
import torch

from loaders.index import open_index
from tests.tiny import tiny_config, tiny_overrides
from train import launch as train_launch
from train.dist import Machines, World, launch
from train.engine import loader_module, loader_options
from train.evaluate import scores_path
from train.log import read_log
from train.model import build_net, compute_logits, stream_spec
from train.scores import read_scores

NUM_STEPS = 3


def record_inputs(world, config, folder):
    """Store what this rank's net is given: videos, taus, inputs and dropout masks, (steps, batch slice, ...)."""
    index = open_index(config.data.root)
    net = build_net(config, "temporal", len(index.classes), world.device)
    seen = {"videos": [], "tau": [], "inputs": [], "mask6": [], "mask7": []}
    loader = loader_module(config).train_loader(
        index,
        index.split("split1_train"),
        stream_spec(config, "temporal"),
        seed=config.train.seed,
        batch_size=config.train.batch_size,
        **loader_options(config, world),
    )
    with loader:
        for step in range(NUM_STEPS):
            batch = next(loader)
            masks = net.draw_masks(
                config.train.seed,
                step,
                batch_size=config.train.batch_size,
                rank=world.rank,
                world_size=world.world_size,
            )
            for name, value in zip(seen, (batch.draw.video, batch.draw.tau, batch.inputs, *masks), strict=True):
                seen[name].append(np.asarray(value))
    total = world.sum(torch.tensor([world.rank + 1]))
    np.savez(folder / f"{world.rank}.npz", total=total.numpy(), **{name: np.stack(v) for name, v in seen.items()})


@pytest.mark.dist
def test_two_processes_share_the_batches_and_masks_of_one(packed, tmp_path):
    found = []
    for num_procs in (1, 2):
        folder = tmp_path / str(num_procs)
        folder.mkdir()
        launch(Machines(num_procs=num_procs), record_inputs, tiny_config(packed), folder)
        found.append([dict(np.load(folder / f"{rank}.npz")) for rank in range(num_procs)])
    (whole,), slices = found
    assert (whole.pop("total"), [part.pop("total") for part in slices]) == ([1], [[3], [3]])
    for name, value in whole.items():
        np.testing.assert_array_equal(np.concatenate([part[name] for part in slices], axis=1), value, err_msg=name)
    assert len(np.unique(whole["videos"])) > 1


@pytest.mark.dist
def test_a_run_of_two_processes_has_the_losses_and_scores_of_one(packed, tmp_path, capfd):
    for num_procs in (1, 2):
        run = ["--run", str(tmp_path / str(num_procs)), "--gpus", "0", "--procs", str(num_procs)]
        train_launch.main([*run, *tiny_overrides(packed, eval__num_taus=3)])
    assert capfd.readouterr().out.count("Two-stream, SVM") == 2  # one process speaks
    for stream in ("spatial", "temporal"):
        logs = [read_log(tmp_path / str(num_procs) / stream / "log.jsonl") for num_procs in (1, 2)]
        one, two = ([(record["step"], record["loss"], record["lr"]) for record in log] for log in logs)
        np.testing.assert_allclose(one, two, rtol=1e-4)
        for part in ("train", "test"):
            one, two = (read_scores(scores_path(tmp_path / str(n), stream, part)) for n in (1, 2))
            np.testing.assert_allclose(one.scores, two.scores, atol=1e-4)
            assert one.num_views.tolist() == two.num_views.tolist()


SENDING = {
    "default": {},
    "small buckets": {"bucket_mb": 0.01},
    "one bucket": {"bucket_mb": 1000.0},
    "bfloat16": {"gradient_compression": "bfloat16"},
}


def record_gradients(world, config, folder):
    """Store the gradients that each way of sending leaves after the second pass: the first one orders the buckets."""
    rng = torch.Generator().manual_seed(world.rank)
    inputs = torch.randn(4, 6, 48, 48, generator=rng)
    gradients = {}
    for name, options in SENDING.items():
        net = build_net(config, "temporal", 3, world.device)
        model = world.wrap(net.train(), **options)
        masks = net.draw_masks(0, 0, batch_size=8, rank=world.rank, world_size=2)
        for _ in range(2):
            model.zero_grad()
            compute_logits(model, inputs, masks, config).square().sum().backward()
        gradients[name] = torch.cat([parameter.grad.flatten() for parameter in net.parameters()]).numpy()
    np.savez(folder / f"{world.rank}.npz", **gradients)


@pytest.mark.dist
def test_buckets_change_no_gradient_and_compression_only_rounds_it(packed, tmp_path):
    launch(Machines(num_procs=2), record_gradients, tiny_config(packed), tmp_path)
    first, second = (dict(np.load(tmp_path / f"{rank}.npz")) for rank in range(2))
    for name in SENDING:
        np.testing.assert_array_equal(first[name], second[name], err_msg=name)
    for name in ("small buckets", "one bucket"):
        np.testing.assert_array_equal(first[name], first["default"], err_msg=name)
    exact, rounded = first["default"], first["bfloat16"]
    assert not np.array_equal(exact, rounded)
    # Each of two terms is rounded to 8 bits, and their sum again; terms may cancel, so the largest sets the scale.
    np.testing.assert_allclose(rounded, exact, rtol=2**-7, atol=2**-8 * np.abs(exact).max())
    assert np.linalg.norm(rounded - exact) < 2**-8 * np.linalg.norm(exact)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train__bucket_mb": 0}, "train.bucket_mb=0.0 must be positive"),
        ({"train__gradient_compression": "int8"}, "train.gradient_compression='int8' must be one of none, bfloat16"),
    ],
)
def test_impossible_ways_of_sending_are_refused(packed, change, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(packed, **change)


def fail(world, message):
    if world.rank == 1:
        raise ValueError(message)
    world.barrier()


@pytest.mark.dist
def test_the_failure_of_one_process_ends_all_and_is_named(capfd):
    with pytest.raises(Exception, match="FAILED"):
        launch(Machines(num_procs=2), fail, "this is why")
    errors = capfd.readouterr().err
    assert "process 1 of 2 failed" in errors
    assert "ValueError: this is why" in errors


@pytest.mark.parametrize(
    ("machines", "batch_size", "message"),
    [
        (Machines(num_gpus=99, num_procs=99), 256, r"--gpus 99: this machine has \d+ usable GPUs"),
        (Machines(num_procs=3), 256, "train.batch_size=256 cannot be split evenly over 3 processes"),
        (Machines(num_procs=2, num_nodes=3, rdzv_endpoint="a:1"), 256, "over 6 processes"),
        (Machines(num_procs=0), 256, "--procs 0 .* must be at least 1"),
        (Machines(num_nodes=2), 256, "--nodes 2 needs --rdzv-endpoint HOST:PORT"),
    ],
)
def test_impossible_requests_are_refused_before_anything_starts(machines, batch_size, message):
    with pytest.raises(ValueError, match=message):
        machines.check(batch_size)


def test_alone_nothing_is_wrapped_or_waited_for():
    world = World(rank=0, world_size=1, device=torch.device("cpu"), num_threads=1)
    net = torch.nn.Linear(1, 1)
    assert world.wrap(net) is net
    assert world.sum(torch.tensor(3)).item() == 3
    world.barrier()
