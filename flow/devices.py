"""Where flow is computed: on which GPUs, in how many processes, and whether a method works there at all."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from flow.extract import GPU_METHODS, prove_method
from flow.pool import default_num_workers, run_alone

#: Processes of one GPU: each has memory of its own on it.
WORKERS_PER_GPU = 8


def prove(method: str, device: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """`flow.extract.prove_method` in a process of its own. Raises ValueError, also if the process dies."""
    metadata = run_alone(partial(prove_method, method, device), parameters)
    if metadata is None:
        raise ValueError(
            f"{method} ends its process on {device!r} with {dict(parameters)}. Leave parameters as they are."
        )
    return metadata


def count_gpus(method: str, asked: int | None) -> int:
    """GPUs to use. Raises ValueError if there are fewer than asked for, or the method can use none."""
    if asked and method not in GPU_METHODS:
        raise ValueError(f"gpus={asked}: {method} runs on the CPU; on a GPU run {', '.join(sorted(GPU_METHODS))}.")
    if asked == 0 or method not in GPU_METHODS:
        return 0
    import torch

    visible = torch.cuda.device_count()
    if asked is not None and not 0 < asked <= visible:
        raise ValueError(f"gpus={asked}: torch sees {visible} here. Ask for as many or fewer; 0 is the CPU.")
    return visible if asked is None else asked


def count_workers(asked: int | None, num_gpus: int) -> int:
    """Processes to use: by default one per core, at most 8 a GPU and one at least. Raises ValueError if so few are
    asked for that a GPU would have none.
    """
    if asked is None:
        cores = default_num_workers()
        return max(num_gpus, min(cores, WORKERS_PER_GPU * num_gpus)) if num_gpus else cores
    if asked < num_gpus:
        raise ValueError(f"workers={asked} for gpus={num_gpus}: a process uses one GPU. Ask for fewer GPUs.")
    return asked
