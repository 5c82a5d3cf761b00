"""The net of a stream: how it is built, what it begins with, and what of it learns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from loaders.batch import StreamSpec
from nets.cnn_m import CNNM
from train.checkpoint import Checkpoint, load_checkpoint
from train.config import from_flat
from train.settings import Config

#: What the parameters of the classification layer begin with.
LAST_LAYER = "scores."

#: A GPU's tensor cores want it; on a CPU it makes a training step up to 1.8 times faster.
MEMORY_FORMAT = torch.channels_last


def stream_spec(config: Config, stream: str) -> StreamSpec:
    """What the stream's loader delivers under this config."""
    data = config.data
    return StreamSpec(
        stream=stream,
        L=data.L,
        crop_px=data.crop_px,
        size_px=None if data.size == "auto" else int(data.size),
        subtract_mean=data.subtract_mean,
        color_jitter=data.color_jitter,
        random_mirror=data.random_mirror,
        stacking=data.stacking,
        bidirectional=data.bidirectional,
        rgb_frames=data.rgb_frames,
        stacks_per_window=data.stacks_per_window if stream == "temporal" else 1,
    )


def net_arguments(config: Config, stream: str, num_classes: int) -> dict[str, Any]:
    """What of a CNNM follows from the config, but for the seed; num_classes: of all tasks together."""
    spec = stream_spec(config, stream)
    num_frames = 1 if spec.is_temporal else spec.rgb_frames
    return {
        "num_channels": spec.num_channels // num_frames,
        "num_classes": num_classes,
        "width": config.model.width,
        "input_px": config.data.crop_px,
        "dropout": config.stream(stream).dropout,
        "second_lrn": stream == "spatial",
        "num_frames": num_frames,
    }


def build_net(config: Config, stream: str, num_classes: int, device: torch.device) -> CNNM:
    """The stream's net on the device; its initial weights depend on the config alone.

    num_classes: of all tasks together. The weights of `init` are not in it yet: see `start_from`.
    """
    net = CNNM(**net_arguments(config, stream, num_classes), seed=config.train.seed)
    net.to(device)
    return net.to(memory_format=MEMORY_FORMAT)  # type: ignore[call-overload]


def num_outputs(checkpoint: Checkpoint, path: Path) -> int:
    """Outputs of a checkpoint's net, of all tasks together. Raises ValueError, which names `path`, if it has none."""
    bias = checkpoint.net.get(f"{LAST_LAYER}bias")
    if bias is None or bias.ndim != 1:
        raise ValueError(f"{path} is of another net than this config's: its last layer has no bias.")
    return len(bias)


def build_optimizer(net: nn.Module, config: Config) -> torch.optim.SGD:
    """SGD over what learns, with the configured momentum and weight decay; the learning rate is set at each step."""
    learning = [parameter for parameter in net.parameters() if parameter.requires_grad]
    return torch.optim.SGD(learning, momentum=config.train.momentum, weight_decay=config.train.weight_decay)


def start_from(net: CNNM, path: str) -> None:
    """Begin with the weights of a checkpoint, all but the last layer's: its classes are others (sec. 5, 6).

    Raises FileNotFoundError if there is none, ValueError if it is of another net.
    """
    checkpoint = load_checkpoint(Path(path))
    check_init(net, checkpoint, path)
    trunk = {name: value for name, value in checkpoint.net.items() if not name.startswith(LAST_LAYER)}
    net.load_state_dict(trunk, strict=False)


def check_init(net: CNNM, checkpoint: Checkpoint, path: str) -> None:
    """Raise ValueError if a checkpoint's layers, but for the last one, are not the net's, or its run is unfinished."""
    steps = from_flat(checkpoint.config).stream(checkpoint.stream).steps
    if checkpoint.step < steps:
        raise ValueError(f"init={path} was stopped at step {checkpoint.step} of {steps}; finish that run first.")
    wanted, found = (
        {name: tuple(value.shape) for name, value in state.items() if not name.startswith(LAST_LAYER)}
        for state in (net.state_dict(), checkpoint.net)
    )
    differing = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
    if differing:
        name = differing[0]
        raise ValueError(
            f"init={path}: {name} has shape {found.get(name, 'none')} there and {wanted.get(name, 'none')} in this "
            f"net, and {len(differing)} parameters differ in all. A net begins with the weights of one of its own "
            "stream, width, L and crop_px."
        )


def compute_logits(net: nn.Module, inputs: Tensor, masks: tuple[Tensor, ...] | None, config: Config) -> Tensor:
    """One forward pass in the configured precision. Returns logits (N, num_classes) float32."""
    kind = inputs.device.type
    bfloat16 = config.train.precision == "bfloat16" or (config.train.precision == "auto" and kind == "cuda")
    with torch.autocast(kind, torch.bfloat16, enabled=bfloat16):
        # Autocast would convert the type anyway; with the layout it is one pass over the batch.
        dtype = torch.bfloat16 if bfloat16 else inputs.dtype
        return net(inputs.to(dtype, memory_format=MEMORY_FORMAT), masks).float()
