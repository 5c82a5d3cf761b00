"""An exported net scores as the run's net does, in a process without this project too, and says what it takes."""

import hashlib
import json
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from flow.shard import write_json
from loaders.index import open_index
from nets.cnn_m import CNNM
from tests.test_evaluate import save_net
from tests.tiny import tiny_config
from train import export
from train.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from train.config import write_config
from train.export import USE, Scorer, export_stream, load_net, main
from train.model import build_net
from train.origin import origin_of
from train.provenance import describe
from train.tasks import Tasks

CLASSES = ["run", "sit", "walk"]
FLOW = {"method": "dis", "parameters": {"preset": "medium"}, "library": "opencv", "version": "5"}
ORIGIN = dict(
    name="mine", fingerprint="f00", root="gone", classes=CLASSES, flow=FLOW, codec={"quality": 90}, size_px=64
)


def make_run(run, stream, num_outputs=(3,), step=10, origin=ORIGIN, fingerprint="f00", **changes):
    """A run folder with a net of random weights and biases; its packed data set is not there."""
    config = tiny_config("gone", train__streams=f"[{stream}]", **changes)
    net = build_net(config, stream, sum(num_outputs), torch.device("cpu")).eval()
    generator = torch.Generator().manual_seed(1)
    for parameter in net.parameters():
        if parameter.ndim == 1:
            parameter.data.normal_(0, 0.1, generator=generator)
    (run / stream).mkdir(parents=True)
    write_config(config, run / "config.yaml")
    write_json(run / "run.json", {"dataset": origin, "made_on": [describe()]})
    save_checkpoint(Checkpoint(stream, step, net.state_dict(), {}, {}, fingerprint), run / stream / "checkpoint.pt")
    return net, config


def further(stream, how):
    return {f"{stream}__extra_roots": "[other]", f"{stream}__extra_lists": "[all]", f"{stream}__extra_as": how}


CASES = {
    "spatial": ("spatial", (3,), {}),
    "temporal": ("temporal", (3,), {}),
    "a second task": (
        "temporal",
        (3, 2),
        {
            "data__L": 4,
            "data__bidirectional": True,
            "data__subtract_mean": False,
            **further("temporal", "tasks"),
        },
    ),
    "added classes": ("spatial", (5,), {"data__rgb_frames": 11, **further("spatial", "classes")}),
}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Case -> its net, and both files, which are not to be changed."""

    @cache
    def of(case):
        stream, num_outputs, changes = CASES[case]
        run = tmp_path_factory.mktemp("run")
        net, config = make_run(run, stream, num_outputs, **changes)
        files = [run / "export" / f"{stream}.safetensors", run / "export" / f"{stream}.pt2"]
        result = export_stream(run, config, stream, run / "export")
        assert list(result.differences) == files and set(files) == set((run / "export").iterdir())
        return net, *files

    return of


@pytest.mark.parametrize("case", CASES)
def test_both_files_score_as_the_net_does(exported, case):
    net, weights, graph = exported(case)
    loaded, about = load_net(weights)
    program = torch.export.load(graph)
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    python = {target for target in targets if not target.startswith("aten.")}
    assert len(targets) > 5 and python <= {"<built-in function getitem>"}  # no code of ours, no region of autocast
    columns = Tasks([], [3, 2] if case == "a second task" else [3]).columns(0)
    generator = torch.Generator().manual_seed(2)
    for batch_size in (4, 1, 9):
        inputs = torch.randn(batch_size, *about["input"]["shape"][1:], generator=generator)
        with torch.inference_mode():
            logits = net(inputs)
            scores = logits[:, columns].softmax(1)
            torch.testing.assert_close(loaded(inputs), logits, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(Scorer(loaded, 3)(inputs), scores)
            torch.testing.assert_close(program.module()(inputs), scores)
        assert (scores - scores[0]).abs().max() > 1e-3 or batch_size == 1, "or what is seen would not count"


def test_the_metadata_say_what_inputs_and_outputs_are(exported):
    net, weights, graph = exported("a second task")
    about = load_net(weights)[1]
    with safe_open(weights, "pt") as file:
        assert json.loads(file.metadata()["two_stream"]) == about
        assert {name: file.get_slice(name).get_dtype() for name in file.keys()} == {n: "F32" for n in net.state_dict()}
    inside = {"metadata.json": ""}
    torch.export.load(graph, extra_files=inside)
    assert json.loads(inside["metadata.json"]) == about

    assert about["input"]["shape"] == ["N", 8, 48, 48]
    assert about["input"]["channels"] == [
        "dx tau+0", "dy tau+0", "dx tau+1", "dy tau+1", "bdx tau-0", "bdy tau-0", "bdx tau-1", "bdy tau-1",
    ]  # fmt: skip
    assert (about["input"]["flow_scale"], about["input"]["subtract_mean"]) == (1.0, False)
    assert about["outputs"]["classes"] == CLASSES
    assert about["outputs"]["further"]["number"] == 2 and about["outputs"]["further"]["data_sets"] == ["other"]
    assert (about["flow"], about["codec"], about["frames"]["size_px"]) == (FLOW, {"quality": 90}, 64)
    assert (about["test"]["num_taus"], len(about["test"]["views"])) == (25, 10)
    checkpoint = (weights.parent.parent / "temporal" / "checkpoint.pt").read_bytes()
    assert about["training"]["checkpoint_sha256"] == hashlib.sha256(checkpoint).hexdigest()
    assert about["training"]["config"]["data.L"] == 4 and about["training"]["made_on"] == [describe()]
    assert "k=2.0, n=5, alpha=0.0001, beta=0.75" in about["architecture"]["layers"]
    rgb = load_net(exported("added classes")[1])[1]["input"]
    assert rgb["shape"] == ["N", 33, 48, 48] and rgb["channels"][:4] == ["red 0", "green 0", "blue 0", "red 1"]
    assert (rgb["mean"], rgb["std"]) == ([123.675, 116.28, 103.53], [58.395, 57.12, 57.375])


def test_a_process_without_this_project_scores_the_same(exported, tmp_path):
    """The lines in --help, run elsewhere, where importing what is ours fails."""
    net, weights, graph = exported("spatial")
    use = USE.replace("RUN", str(weights.parent.parent)).replace("STREAM", "spatial")
    inputs = torch.randn(4, 3, 48, 48, generator=torch.Generator().manual_seed(3))
    torch.save(inputs, tmp_path / "inputs.pt")
    code = f"""
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("flow", "loaders", "nets", "train", "tests"):
            raise ImportError(name)

sys.meta_path.insert(0, Blocked())
{use}
assert scores.shape == (8, 3) and set(best) <= set({CLASSES}) and len(weights) == {len(net.state_dict())}
torch.save(net(torch.load("inputs.pt")), "scores.pt")
"""
    subprocess.run([sys.executable, "-I", "-c", code], cwd=tmp_path, check=True)
    with torch.inference_mode():
        torch.testing.assert_close(torch.load(tmp_path / "scores.pt"), net(inputs).softmax(1))
    root = str(Path(export.__file__).parent.parent).encode()
    assert root not in graph.read_bytes() and root not in weights.read_bytes()


def test_the_same_run_gives_the_same_bytes(exported, tmp_path):
    files = exported("temporal")[1:]
    run = files[0].parent.parent
    main([str(run), "--out", str(tmp_path / "again")])
    for file in files:
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes()


def test_a_file_whose_scores_differ_gets_no_name(tmp_path, monkeypatch):
    _, config = make_run(tmp_path, "temporal")
    out = tmp_path / "export"
    out.mkdir()
    (out / "temporal.pt2").write_text("of an earlier export")
    save_graph = export._save_graph

    def save_another(scorer, metadata, path):
        scorer.net.scores.bias[0] += 0.01
        save_graph(scorer, metadata, path)

    monkeypatch.setattr(export, "_save_graph", save_another)
    with pytest.raises(RuntimeError, match="temporal.pt2 was not written: of 1 inputs its scores would differ"):
        export_stream(tmp_path, config, "temporal", out)
    assert [path.name for path in out.iterdir()] == ["temporal.pt2"]
    assert (out / "temporal.pt2").read_text() == "of an earlier export"


def test_a_net_that_is_sure_of_a_class_is_compared_in_its_other_scores_too():
    class Sure(torch.nn.Module):
        def __init__(self, other):
            super().__init__()
            self.other = other

        def forward(self, inputs):
            return torch.tensor([[1.0, self.other]]).expand(len(inputs), 2)

    assert export._largest_difference(Sure(1e-8), Sure(1.0001e-8), [1, 1, 1], Path("x")) < 1e-11
    for wrong in (2e-8, float("nan")):
        with pytest.raises(RuntimeError, match="x was not written"):
            export._largest_difference(Sure(1e-8), Sure(wrong), [1, 1, 1], Path("x"))


def test_the_command_exports_what_is_there_and_says_how_far_it_was_trained(tmp_path, packed, capsys):
    """Of a run of an older release, without run.json, the packed set says which classes there are."""
    config, index = tiny_config(packed, train__streams="[spatial, temporal]"), open_index(packed)
    save_net(config, "temporal", index, tmp_path, step=4)
    write_config(config, tmp_path / "config.yaml")
    with pytest.raises(SystemExit, match="no checkpoint at .*spatial.*train this stream first"):
        main([str(tmp_path)])
    main([str(tmp_path), "--streams", "temporal"])
    printed = capsys.readouterr().out
    assert "temporal, step 4 of 10, not finished:" in printed
    assert "export/temporal.pt2" in printed and "largest difference of scores" in printed
    about = load_net(tmp_path / "export" / "temporal.safetensors")[1]
    assert about["outputs"] == {"classes": index.classes, "further": None}
    assert about["training"]["dataset"] == {"name": "arrays", "fingerprint": origin_of(index).fingerprint}


def test_what_does_not_fit_together_is_refused(tmp_path):
    _, config = make_run(tmp_path / "run-a", "spatial")
    with pytest.raises(SystemExit, match=r"no run folder: no config.yaml.*Did you mean '.*/run-a'"):
        main([str(tmp_path / "run-b")])
    with pytest.raises(ValueError, match="checkpoint.pt is of another net than this config's"):
        export_stream(tmp_path / "run-a", tiny_config("gone", model__width=0.0625), "spatial", tmp_path / "out")
    make_run(tmp_path / "c", "spatial", fingerprint="bad")
    with pytest.raises(ValueError, match="trained on data set bad, and run.json.* describes f00"):
        export_stream(tmp_path / "c", config, "spatial", tmp_path / "out")
    (tmp_path / "run-a" / "run.json").unlink()
    with pytest.raises(ValueError, match="run.json is missing, and so is the packed data set"):
        export_stream(tmp_path / "run-a", config, "spatial", tmp_path / "out")
    make_run(tmp_path / "d", "spatial")
    path = tmp_path / "d" / "spatial" / "checkpoint.pt"
    checkpoint = load_checkpoint(path)
    checkpoint.net["full6.bias"][0] = torch.nan
    save_checkpoint(checkpoint, path)
    with pytest.raises(ValueError, match="full6.bias holds values that are not finite"):
        export_stream(tmp_path / "d", config, "spatial", tmp_path / "out")
    assert not list(tmp_path.glob("out/*"))
    (tmp_path / "file").touch()
    make_run(tmp_path / "e", "spatial")
    with pytest.raises(OSError, match="cannot write .*file"):
        export_stream(tmp_path / "e", config, "spatial", tmp_path / "file")


def test_a_net_of_unheard_of_size_takes_no_memory_on_the_meta_device():
    with torch.device("meta"):
        net = CNNM(3, 10, width=16, second_lrn=True)
    assert {parameter.device.type for parameter in net.parameters()} == {"meta"}
