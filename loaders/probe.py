"""Which decoder works on this machine. GPU decoders may end the process, so they are tried in one of their own.

`python -m loaders.probe DECODER REGION` decodes a large batch and exits with 0 if it agrees with the CPU's decoder.
"""

import logging
import subprocess
import sys
from functools import lru_cache

import numpy as np

from flow.codec import Codec, encode_component
from loaders.batch import StreamSpec
from loaders.pipeline import Graph, train_pipeline

logger = logging.getLogger(__name__)

#: Largest difference in codes between two JPEG decoders of which both are right.
TOLERANCE = 2
#: The known crashes need a large flat batch; toy batches pass.
_NUM_IMAGES = 640


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
    """Whether a decoder of the GPU graph survives a large batch and agrees with the CPU."""
    command = [sys.executable, "-m", "loaders.probe", decoder, str(int(region))]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    if result.returncode:
        logger.warning(
            "GPU decoder %s with region=%s is unusable here (exit code %d): %s",
            decoder, region, result.returncode, result.stderr.strip()[-500:],
        )  # fmt: skip
    return result.returncode == 0


def codes(graph: Graph, num_images: int = _NUM_IMAGES) -> np.ndarray:
    """Codes of generated grey JPEGs, cropped, as the graph decodes them: (num_images, 1, 224, 224) float32."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:256, :340].astype(np.float32)
    components = [np.sin(x / rng.uniform(5, 40)) + np.cos(y / rng.uniform(5, 40)) for _ in range(16)]
    jpegs = [np.frombuffer(encode_component(c.astype(np.float32), Codec()).jpeg, np.uint8) for c in components]
    starts = rng.integers(0, (33, 117), (num_images, 2)).astype(np.int32)

    def feed() -> tuple[object, ...]:
        zeros, ones = np.zeros((num_images, 1), np.float32), np.ones((num_images, 1), np.float32)
        return [jpegs[i % 16] for i in range(num_images)], starts, zeros, ones, np.zeros(num_images, np.int32)

    spec = StreamSpec(stream="temporal", L=1)
    (output,) = train_pipeline(spec, graph, num_images // spec.num_images, feed).run()
    return np.asarray((output.as_cpu() if graph.device == "cuda" else output).as_tensor())


def main() -> int:
    decoder, region = sys.argv[1], bool(int(sys.argv[2]))
    found = codes(Graph(device="cuda", decoder=decoder, region=region))
    difference = float(np.abs(found - codes(Graph())).max())
    if difference > TOLERANCE:
        sys.stderr.write(f"differs from the CPU's decoder by up to {difference} codes")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
