"""The nets of a run for use without this project and its data set: `python -m train.export RUN`.

    spatial.safetensors   the weights, float32, under the key `two_stream` of its metadata what to know to use them
    spatial.pt2           the net as a graph of torch: inputs (N, C, crop, crop) float32 -> scores (N, K); the same
                          metadata as `metadata.json` among its extra files

Each file is read back, and its scores are held against the net's, before it gets its name.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from tqdm import tqdm

from flow.command import Parser, describe_error, tidy_end
from flow.shard import check_class_name, publish
from flow.untrusted import open_regular, parse_json, printable
from nets.cnn_m import CNNM
from train.checkpoint import load_checkpoint, load_state
from train.config import read_config
from train.disk import writing
from train.engine import CHECKPOINT
from train.model import MEMORY_FORMAT, build_net, num_outputs
from train.net_card import FORMAT_VERSION, describe_net
from train.origin import check_outputs, read_made_on, read_origin
from train.settings import STREAMS, Config

KEY = "two_stream"

#: Of a .safetensors: a hundred thousand classes, or tensors that take 90 MB though they are empty.
_MAX_HEADER_BYTES = 1 << 22

#: Largest difference between equal scores: what float32 and another order of summation leave. Also in proportion to
#: a score, since a net that is sure of a class, whatever it sees, has all others near 0.
TOLERANCE, RELATIVE_TOLERANCE = 1e-5, 1e-3
_LEAST = 1e-30
_BATCH_SIZES = (1, 2, 5)

USE = """\
import json, safetensors, torch

with safetensors.safe_open("RUN/export/STREAM.safetensors", "pt") as file:
    about = json.loads(file.metadata()["two_stream"])  # inputs, outputs, flow, ...
    weights = {name: file.get_tensor(name) for name in file.keys()}

net = torch.export.load("RUN/export/STREAM.pt2").module()
inputs = torch.zeros(8, *about["input"]["shape"][1:])  # what they are: about["input"]
scores = net(inputs)  # (8, K) float32, rows sum to 1
best = [about["outputs"]["classes"][k] for k in scores.argmax(1)]
"""


class Scorer(nn.Module):
    """Inputs (N, C, crop, crop) float32 -> scores (N, K): the softmax over the first K outputs of a net."""

    def __init__(self, net: nn.Module, num_classes: int) -> None:
        super().__init__()
        self.net, self.num_classes = net, num_classes

    def forward(self, inputs: Tensor) -> Tensor:
        logits: Tensor = self.net(inputs.contiguous(memory_format=MEMORY_FORMAT))
        return logits[:, : self.num_classes].softmax(1)


@dataclass(frozen=True)
class Exported:
    """What `export_stream` wrote. differences: of each file's scores to the net's, the largest."""

    differences: dict[Path, float]
    metadata: dict[str, Any]


def export_stream(run: Path, config: Config, stream: str, folder: Path) -> Exported:
    """Write a stream's net as `folder/STREAM.safetensors` and `.pt2`. With a run.json the packed set may be gone.

    Both are read back and have to score random inputs as the net does before either gets its name.
    Raises FileNotFoundError without a checkpoint; ValueError if it is of another net or data set; RuntimeError if a
    file's scores are not the net's; OSError if one cannot be written. None of them leaves a file behind.
    """
    path = run / stream / CHECKPOINT
    checkpoint = load_checkpoint(path)
    origin = read_origin(run, config)
    check_outputs(origin, config, stream, num_outputs(checkpoint, path))
    net = build_net(config, stream, num_outputs(checkpoint, path), torch.device("cpu"))
    load_state(net, checkpoint.net, path)
    metadata = describe_net(net, config, checkpoint, origin)
    with open(path, "rb") as file:
        metadata["training"]["checkpoint_sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
    metadata["training"]["made_on"] = read_made_on(run)

    scorer = Scorer(net.eval(), len(origin.classes))
    shape = metadata["input"]["shape"][1:]
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    weights, graph = folder / f"{stream}.safetensors", folder / f"{stream}.pt2"
    with torch.no_grad(), _renamed_at_the_end(weights) as new_weights, _renamed_at_the_end(graph) as new_graph:
        save_net(net, metadata, new_weights)
        loaded = Scorer(load_net(new_weights)[0], len(origin.classes))
        differences = {weights: _largest_difference(scorer, loaded, shape, weights)}
        _save_graph(loaded, metadata, new_graph)
        with open(new_graph, "rb") as file:  # a file, as torch wants names to end in .pt2
            program = torch.export.load(file).module()
        differences[graph] = _largest_difference(scorer, program, shape, graph)
    return Exported(differences, metadata)


def _save_graph(scorer: Scorer, metadata: dict[str, Any], path: Path) -> None:
    """Write what the scorer computes, for any number of inputs."""
    example = torch.zeros(2, *metadata["input"]["shape"][1:])
    sizes = {"inputs": {0: torch.export.Dim("N", min=1)}}
    program = torch.export.export(scorer.requires_grad_(False), (example,), dynamic_shapes=sizes, strict=False)
    program.example_inputs = None  # as large as two inputs
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # paths of this machine
    buffer = io.BytesIO()  # writing to a disk that is full, torch would end the process
    torch.export.save(program, buffer, extra_files={"metadata.json": _to_json(metadata)})
    path.write_bytes(buffer.getbuffer())


def _to_json(metadata: dict[str, Any]) -> str:
    return json.dumps(metadata, ensure_ascii=False)


def _largest_difference(net: nn.Module, other: nn.Module, shape: list[int], path: Path) -> float:
    """Largest difference between the scores of a net and another on random inputs (N, *shape), for several N.

    Each input of a batch is a third as large as the one before: of large ones a net may be too sure to tell much.
    Raises RuntimeError that names `path` if they are not equal.
    """
    generator = torch.Generator().manual_seed(0)
    largest = 0.0
    for batch_size in _BATCH_SIZES:
        size = 3.0 ** -torch.arange(batch_size)[:, None, None, None]
        inputs = torch.randn(batch_size, *shape, generator=generator) * size
        expected = net(inputs)
        difference = (other(inputs) - expected).abs()
        largest = max(largest, difference.max().item())
        if not (difference <= (RELATIVE_TOLERANCE * expected).clamp(_LEAST, TOLERANCE)).all():
            raise RuntimeError(
                f"{path} was not written: of {batch_size} inputs its scores would differ from the net's by "
                f"{difference.max():.1e}, where only rounding may. This is torch {torch.__version__}; take the version "
                "in constraints.txt."
            )
    return largest


@contextmanager
def _renamed_at_the_end(path: Path) -> Iterator[Path]:
    """A temporary name for a file, which gets its own if nothing is raised, and is deleted otherwise."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with writing(path):
            yield temporary
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            publish(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_net(net: CNNM, metadata: dict[str, Any], path: Path) -> None:
    """Write a .safetensors file for `load_net`; metadata of `describe_net`. ValueError if a weight is not finite."""
    weights = {name: value.contiguous() for name, value in net.state_dict().items()}
    _check_finite(weights)
    # One key, since several would stand in another order every time.
    path.write_bytes(save(weights, {KEY: _to_json(metadata)}))


def load_net(path: str | Path) -> tuple[CNNM, dict[str, Any]]:
    """The net in a .safetensors file, ready to score on the CPU, and what `describe_net` says of it.

        net, about = load_net("RUN/export/temporal.safetensors")
        scores = Scorer(net, len(about["outputs"]["classes"]))(inputs)

    The file may be a stranger's: nothing in it is run, and it takes no more memory than its own size and a header do.
    Raises FileNotFoundError; ValueError if the file is damaged or none of this program's.
    """
    path = Path(path)
    try:
        text, weights = _read(path)
        metadata = _checked(parse_json(text.encode()))
        arguments = metadata["architecture"]["arguments"]
        with torch.device("meta"):  # as large as it may claim to be
            wanted = CNNM(**arguments).state_dict()
        _check_weights(weights, wanted)
        _check_finite(weights)
        net = CNNM(**arguments)
        net.load_state_dict(weights)
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError, ArithmeticError, SafetensorError) as error:
        why = f"no {error}" if isinstance(error, KeyError) else error
        raise ValueError(
            f"{path} is damaged, or no file of train.export ({printable(why)}). Put back a copy, or export again."
        ) from error
    return net.eval(), metadata


def _read(path: Path) -> tuple[str, dict[str, Tensor]]:
    """Metadata and tensors of a .safetensors file."""
    with open_regular(path) as file:
        length = int.from_bytes(file.read(8), "little")
    if length > _MAX_HEADER_BYTES:
        raise ValueError(f"its header has {length:,} bytes, expected at most {_MAX_HEADER_BYTES:,}")
    with safe_open(path, "pt") as file:  # holds the header against the file's size
        text = (file.metadata() or {}).get(KEY)
        if text is None:
            raise ValueError(f"its metadata have no {KEY!r}")
        return text, {name: file.get_tensor(name) for name in file.keys()}


def _checked(metadata: dict[str, Any]) -> dict[str, Any]:
    """The metadata, or what comes of it, unless what it says of the net is of the kind that `describe_net` writes."""
    if metadata["format_version"] != FORMAT_VERSION or metadata["stream"] not in STREAMS:
        raise ValueError(
            f"format {metadata['format_version']!r:.40}, stream {metadata['stream']!r:.40}; this program reads format "
            f"{FORMAT_VERSION}, {' and '.join(STREAMS)}"
        )
    classes = metadata["outputs"]["classes"]
    for name in classes:
        check_class_name(name)
    if not isinstance(classes, list) or not 1 <= len(classes) <= metadata["architecture"]["arguments"]["num_classes"]:
        raise ValueError(f"{len(classes)} classes, expected a list of at least one, and no more than outputs")
    return metadata


def _check_weights(weights: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """Raise ValueError unless names and shapes are those of the net that the weights are to be for."""
    for name in sorted(weights.keys() | wanted.keys()):
        found, like = (f"{list(of[name].shape)} {of[name].dtype}" if name in of else "none" for of in (weights, wanted))
        if found != like:
            raise ValueError(f"{name} is {found}, and {like} in the net that the metadata describe")


def _check_finite(weights: Mapping[str, Tensor]) -> None:
    for name, value in weights.items():
        if not value.isfinite().all():
            raise ValueError(f"{name} holds values that are not finite: the training of this net has failed")


def main(arguments: list[str] | None = None) -> None:
    """Command line: export a run's streams and say how equal they are."""
    parser = Parser(
        prog="python -m train.export",
        description="Write a run's nets for use without this project: STREAM.safetensors, the weights and what\n"
        "to know of them, and STREAM.pt2, a graph of torch from inputs to scores. Each is read back, and\n"
        "its scores held against the net's, before it gets its name.",
        epilog="example:\n  python -m train.export runs/ucf101\n\n"
        "exit code: 0 exported; 1 failed, the last line says why; 130, 143 stopped\n\n"
        f"use of the files, STREAM being spatial or temporal:\n\n{USE}",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder of train.launch")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for the files (default: RUN/export)")
    parser.add_argument("--streams", nargs="+", choices=STREAMS, help="which nets (default: all of the run)")
    options = parser.parse_args(arguments)
    try:
        with tidy_end():
            _export(options)
    except (ValueError, OSError, RuntimeError) as error:
        sys.exit(f"error: {describe_error(error)}")


def _export(options: argparse.Namespace) -> None:
    config = read_config(options.run / "config.yaml")
    for stream in tqdm(options.streams or config.train.streams, desc="export", unit="stream", disable=None):
        exported = export_stream(options.run, config, stream, options.out or options.run / "export")
        training = exported.metadata["training"]
        unfinished = "" if training["step"] >= training["steps"] else ", not finished"
        tqdm.write(f"{stream}, step {training['step']} of {training['steps']}{unfinished}:")
        for file, difference in exported.differences.items():
            tqdm.write(f"  {file}  {file.stat().st_size:,} bytes, largest difference of scores {difference:.1g}")


if __name__ == "__main__":
    main()
