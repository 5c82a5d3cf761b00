"""What tests of strangers' files share: tars with any header, what is no regular file, and a bound on memory."""

import io
import os
import re
import tarfile
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def bounded_memory(megabytes=200):
    """Fail if the process takes more memory meanwhile than it has now; the system keeps the highest mark."""

    def mark(kind):
        return int(re.search(rf"{kind}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024

    Path("/proc/self/clear_refs").write_text("5")
    before = mark("VmRSS")
    yield
    taken = mark("VmHWM") - before
    assert taken < megabytes, f"took {taken:.0f} MB"


NOT_REGULAR = {
    "fifo": os.mkfifo,
    "folder": os.mkdir,
    "link to a device": lambda path: os.symlink("/dev/zero", path),
}


def replace(path, kind):
    path.unlink()
    NOT_REGULAR[kind](path)


def tar_of(path, *members):
    """A tar of (name, content, changes of its header)."""
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as archive:
        for name, content, changes in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            for key, value in changes.items():
                setattr(info, key, value)
            archive.addfile(info, io.BytesIO(content))
    return path
