"""Which decoder is the fastest that works on this machine. GPU decoders may end the process: first one of their own.

`python -m loaders.probe DECODER REGION GPU` decodes large batches and exits with 0 if they agree with the CPU's.
"""

import logging
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from flow.codec import Codec, encode_component, encode_rgb
from loaders.batch import StreamSpec
from loaders.pipeline import QUEUE_DEPTH, Graph, train_pipeline

logger = logging.getLogger(__name__)

#: Largest difference in codes between two JPEG decoders of which both are right.
TOLERANCE = 2
#: Stream -> images of a batch. The known crashes need a large flat batch, of 256 and more; toy batches pass.
_NUM_IMAGES = {"temporal": 640, "spatial": 320}
_TIMEOUT_S = 120


def choose_graph(
    device: str, num_threads: int, decoder: str, measure: Callable[[Graph], float], *, whole_frames: bool = False
) -> Graph:
    """The graph for a device: on a GPU the fastest of those that work there.

    decoder: "auto", or the only one to consider: "cpu", "mixed" or "shared". measure: samples/s of a graph.
    whole_frames: the loader decodes no regions, whatever the graph could.
    Tried are the CPU's decoder, the GPU's of regions and of whole frames, and both at once, each with the part of the
    images that its own rate promises. What was measured and chosen is logged.
    Raises ValueError for a decoder that does not work here.
    """
    cpu = Graph(device, num_threads=num_threads)
    if device == "cpu":
        return cpu if decoder == "auto" else replace(cpu, decoder=decoder)
    if decoder == "cpu":
        return cpu
    regions = (False,) if whole_frames else (True, False)
    mixed = [replace(cpu, decoder="mixed", region=region) for region in regions if works("mixed", region)]
    if decoder != "auto" and not mixed:
        raise ValueError(f"data.decoder={decoder}: the GPU decoder does not work here, see the log. Take auto or cpu.")
    rates = {graph: measure(graph) for graph in ([] if decoder == "mixed" else [cpu]) + mixed}
    if mixed and decoder != "mixed":
        fastest = max(mixed, key=lambda graph: rates[graph])
        total = rates[cpu] + rates[fastest]
        shared = replace(fastest, decoder="shared", mixed_share=rates[fastest] / total)
        rates[shared] = measure(shared)
    chosen = max(rates if decoder != "shared" else [shared], key=lambda graph: rates[graph])
    for graph, rate in rates.items():
        logger.info("decoder %s: %.0f samples/s%s", _named(graph), rate, ", chosen" if graph == chosen else "")
    return chosen


def _named(graph: Graph) -> str:
    part = f", {100 * graph.mixed_share:.0f} % on the GPU" if graph.decoder == "shared" else ""
    return f"{graph.decoder} ({'regions' if graph.region else 'whole frames'}{part})"


def samples_per_s(pipeline: Any, batch_size: int, num_batches: int = 6) -> float:
    """Rate of a pipeline that is given the same batch again and again; reading is not counted."""
    for _ in range(QUEUE_DEPTH + 1):
        pipeline.run()
    start_s = time.perf_counter()
    for _ in range(num_batches):
        pipeline.run()
    return num_batches * batch_size / (time.perf_counter() - start_s)


@lru_cache
def works(decoder: str, region: bool) -> bool:
    """Whether a decoder of the GPU graph survives large batches on this process's GPU and agrees with the CPU."""
    import torch

    command = [sys.executable, "-m", "loaders.probe", decoder, str(int(region)), str(torch.cuda.current_device())]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S)
        failure = f"exit code {result.returncode}: {result.stderr.strip()[-500:]}" if result.returncode else ""
    except subprocess.TimeoutExpired:
        failure = f"no answer within {_TIMEOUT_S} s"
    if failure:
        logger.warning("GPU decoder %s with region=%s is unusable here: %s", decoder, region, failure)
    return not failure


def codes(graph: Graph, stream: str) -> npt.NDArray[np.float32]:
    """Codes of generated JPEGs, cropped, as the graph decodes them: (images, 1 or 3, 224, 224) float32."""
    spec = StreamSpec(stream=stream, L=1)
    count, channels = _NUM_IMAGES[stream], 3 if stream == "spatial" else 1
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:256, :340].astype(np.float32)
    waves = [np.sin(x / rng.uniform(5, 40)) + np.cos(y / rng.uniform(5, 40)) for _ in range(16 * channels)]
    if stream == "spatial":
        frames = [np.stack(waves[3 * i : 3 * i + 3], axis=-1) * 60 + 128 for i in range(16)]
        jpegs = [encode_rgb(frame.astype(np.uint8), 90) for frame in frames]
    else:
        jpegs = [encode_component(wave.astype(np.float32), Codec()).jpeg for wave in waves]
    # As the source leaves them: behind an image's end, what is left of longer ones, with ends of their own.
    longest = max(map(len, jpegs))
    rows = np.empty((count, longest), np.uint8)
    for i, row in enumerate(rows):
        row[:] = np.resize(np.frombuffer(jpegs[(i + 1) % 16][-1000:], np.uint8), longest)
        row[: len(jpegs[i % 16])] = np.frombuffer(jpegs[i % 16], np.uint8)
    starts = rng.integers(0, (33, 117), (count, 2)).astype(np.int32)
    shape = count if stream == "temporal" else (count, channels)
    inputs = rows, starts, np.zeros(count, np.int32), np.ones(shape, np.float32), np.zeros(shape, np.float32)
    (output,) = train_pipeline(spec, graph, count // spec.num_images, lambda: inputs).run()
    found = np.asarray((output.as_cpu() if graph.device == "cuda" else output).as_tensor())
    return found.reshape(count, channels, *found.shape[1:3]) if stream == "temporal" else found


def main() -> int:
    import torch

    decoder, region = sys.argv[1], bool(int(sys.argv[2]))
    torch.cuda.set_device(int(sys.argv[3]))
    for stream in _NUM_IMAGES:
        found = codes(Graph(device="cuda", decoder=decoder, region=region), stream)
        difference = float(np.abs(found - codes(Graph(), stream)).max())
        if difference > TOLERANCE:
            sys.stderr.write(f"{stream}: differs from the CPU's decoder by up to {difference} codes")
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
