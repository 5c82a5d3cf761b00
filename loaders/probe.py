"""Which decoder works on this machine. GPU decoders may end the process, so they are tried in one of their own.

`python -m loaders.probe DECODER REGION GPU` decodes large batches and exits with 0 if they agree with the CPU's.
"""

import logging
import subprocess
import sys
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from flow.codec import Codec, encode_component, encode_rgb
from loaders.batch import StreamSpec
from loaders.pipeline import Graph, train_pipeline

logger = logging.getLogger(__name__)

#: Largest difference in codes between two JPEG decoders of which both are right.
TOLERANCE = 2
#: Stream -> images of a batch. The known crashes need a large flat batch, of 256 and more; toy batches pass.
_NUM_IMAGES = {"temporal": 640, "spatial": 320}
_TIMEOUT_S = 120


def default_graph(device: str, num_threads: int) -> Graph:
    """Graph for a device. On a GPU: region decoding there, else of whole frames there, else on the CPU; what works."""
    if device == "cpu":
        return Graph(num_threads=num_threads)
    for decoder, region in (("mixed", True), ("mixed", False), ("cpu", True)):
        if decoder == "cpu" or works(decoder, region):
            logger.info("GPU loader: decoder=%s, region=%s", decoder, region)
            return Graph(device=device, decoder=decoder, region=region, num_threads=num_threads)
    raise AssertionError("the CPU decoder is always taken")


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
    images = [np.frombuffer(jpegs[i % 16], np.uint8) for i in range(count)]
    starts = rng.integers(0, (33, 117), (count, 2)).astype(np.int32)
    identity = np.zeros((count, channels), np.float32), np.ones((count, channels), np.float32)
    inputs = images, starts, *identity, np.zeros(count, np.int32)
    (output,) = train_pipeline(spec, graph, count // spec.num_images, lambda: inputs).run()
    return np.asarray((output.as_cpu() if graph.device == "cuda" else output).as_tensor())


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
