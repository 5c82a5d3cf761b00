"""Work that ends its process, in a module of its own: processes start anew, and import little for it."""

import os
import signal

from flow import images

DEADLY = "bee/bee.1"
write_images = images.write_images


def write_or_die(task):
    """As `flow.images.write_images`, but one image ends the process."""
    if any(source.video_id == DEADLY for source in task.sources):
        os.kill(os.getpid(), signal.SIGKILL)
    return write_images(task)
