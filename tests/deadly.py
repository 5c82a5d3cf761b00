"""Work that ends its process, in a module of its own: processes start anew, and import little for it."""

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

from flow import images
from flow.fragment import write_fragment

DEADLY = "bee/bee.1"
write_images = images.write_images


def write_or_die(task):
    """As `flow.images.write_images`, but one image ends the process."""
    if any(source.video_id == DEADLY for source in task.sources):
        os.kill(os.getpid(), signal.SIGKILL)
    return write_images(task)


def write_or_fail(task):
    """As `flow.fragment.write_fragment`, but the GPU fails: for videos of class Run always, of class Sit once."""
    once = task.path.with_suffix(".failed")
    if task.class_name == "Run" or (task.class_name == "Sit" and not once.exists()):
        once.touch()
        raise RuntimeError("CUDA out of memory. Tried to allocate\n2 GiB")
    return write_fragment(task)


def write_or_crash(task):
    """As `flow.fragment.write_fragment`, but the process ends: for videos of class Run always, of class Sit once."""
    once = task.path.with_suffix(".crashed")
    if task.class_name == "Run" or (task.class_name == "Sit" and not once.exists()):
        once.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return write_fragment(task)


def tell_gpu(task):
    """Which GPUs this process sees; for a while, so that others are at work at the same time."""
    time.sleep(0.3)
    return os.environ.get("CUDA_VISIBLE_DEVICES")


@dataclass(frozen=True)
class GpuTask:
    fragment: Path
    inputs: tuple = ()
