"""What describes a net to those who have neither this project nor its data set: `describe_net`."""

from __future__ import annotations

from typing import Any

from loaders.batch import FLOW_SCALE, RGB_MEAN, RGB_STD, StreamSpec
from loaders.views import VIEWS
from nets.cnn_m import CNNM
from train.checkpoint import Checkpoint
from train.config import to_flat
from train.model import net_arguments, stream_spec
from train.origin import Origin
from train.provenance import describe
from train.settings import Config

FORMAT_VERSION = 1


def describe_net(net: CNNM, config: Config, checkpoint: Checkpoint, origin: Origin) -> dict[str, Any]:
    """All that it takes to use a net: plain values for JSON.

    format_version, stream
    architecture  name; arguments of `nets.cnn_m.CNNM`; its layers and how they are connected, in words
    outputs       classes: names of the first K outputs, whose softmax are the scores; further: the outputs after these
    input         shape, dtype, channels: their names in order; how values come from frames and fields
    frames        how they are scaled before flow is computed and crops are cut
    flow, codec   method, parameters, library and version; how fields were stored
    test          which views of a video are scored, and how they are put together
    training      step reached and step asked for, data set, config
    exported_by   versions and commit

    Raises ValueError if the checkpoint is of another data set than the origin.
    """
    spec, here = stream_spec(config, checkpoint.stream), describe()
    if checkpoint.dataset.split("+")[0] != origin.fingerprint:
        raise ValueError(
            f"the {spec.stream} checkpoint was trained on data set {checkpoint.dataset}, and run.json, or data.root, "
            f"describes {origin.fingerprint}. Put back the run.json, or the data set, of this run."
        )
    return {
        "format_version": FORMAT_VERSION,
        "stream": spec.stream,
        "architecture": {
            "name": "CNN-M-2048",
            "arguments": net_arguments(config, spec.stream, net.scores.out_features),
            "layers": repr(net),
            "forward": "features, flatten, full6, ReLU, full7, ReLU, scores. An lrn divides x_c by (k + alpha * the "
            "sum of x_j^2 over the n channels around c) ^ beta. Merge layers and conv1 to conv3 see several time "
            "steps as channels: nets/slow_fusion.py.",
        },
        "outputs": _outputs(config, spec.stream, net.scores.out_features, origin),
        "input": _input(spec),
        "frames": {
            "stored_size_px": origin.size_px,
            "size_px": spec.size_px or origin.size_px,
            "how": "The smaller side becomes stored_size_px, by area averaging if that is less, else bilinearly, and "
            "then flow is computed. For another size_px frames and fields are scaled bilinearly, and the vectors with "
            "them.",
        },
        "flow": origin.flow,
        "codec": origin.codec,
        "test": {
            "num_taus": config.eval.paper_taus,
            "views": [list(view) for view in VIEWS],
            "how": "A video's score is the mean over num_taus samples at equal spacing, from the first that fits to "
            "the last, and these views of each: (y, x, mirrored), a crop at floor(y * (height - crop)) and floor(x * "
            "(width - crop)). A mirrored view is flipped, and its dx are negated. A stream's scores and the other's "
            "are averaged.",
        },
        "training": {
            "step": checkpoint.step,
            "steps": config.stream(spec.stream).steps,
            "dataset": {"name": origin.name, "fingerprint": checkpoint.dataset},
            "config": to_flat(config),
        },
        "exported_by": {name: here[name] for name in ("versions", "commit")},
    }


def _outputs(config: Config, stream: str, num_outputs: int, origin: Origin) -> dict[str, Any]:
    options, further = config.stream(stream), None
    if num_outputs > len(origin.classes):
        how = {
            "tasks": "a softmax layer of its own for each of these data sets, in this order",
            "classes": "classes of these data sets, added to the softmax layer in training alone",
        }[options.extra_as]
        further = {"number": num_outputs - len(origin.classes), "what": how, "data_sets": options.extra_roots}
    return {"classes": origin.classes, "further": further}


def _input(spec: StreamSpec) -> dict[str, Any]:
    size = {"shape": ["N", spec.num_channels, spec.crop_px, spec.crop_px], "dtype": "float32"}
    if not spec.is_temporal:
        return {
            **size,
            "channels": [f"{color} {t}" for t in range(spec.rgb_frames) for color in ("red", "green", "blue")],
            "how": "A crop of consecutive frames, (value - mean) / std of its channel, values from 0 to 255.",
            "mean": RGB_MEAN.astype(float).round(3).tolist(),
            "std": RGB_STD.astype(float).round(3).tolist(),
        }
    forward = [f"{axis} tau+{k}" for k in range(spec.chain_steps) for axis in ("dx", "dy")]
    backward = [f"b{axis} tau-{k}" for k in range(spec.chain_steps) for axis in ("dx", "dy")]
    return {
        **size,
        "channels": forward + backward if spec.bidirectional else forward,
        "how": "A crop of displacement fields, in px/frame of frames of size_px, times flow_scale. dx, dy t: from "
        "frame t to t+1, to the right and down; bdx, bdy t: from frame t to t-1. subtract_mean: less the mean vector "
        "of the whole field. stacking trajectory: a field is looked up where the points of the first one have moved "
        "to: flow/fields.py.",
        "flow_scale": FLOW_SCALE,
        "subtract_mean": spec.subtract_mean,
        "stacking": spec.stacking,
        "bidirectional": spec.bidirectional,
    }
