"""Sets as they lie in a store, and a store that counts what it is asked for. Used by tests of the cache."""

import hashlib
import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np

from flow.codec import Codec
from flow.dataset import describe_files
from flow.shard import FORMAT_VERSION, write_json
from flow.store import Store


def list_files(root):
    """Name in dataset.json the set's other files, as a set does that is to be published."""
    dataset = json.loads((root / "dataset.json").read_text())
    dataset["files"] = describe_files(root)
    write_json(root / "dataset.json", dataset)


def described(root, name):
    content = (root / name).read_bytes()
    return {"name": name, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def published(packed, root):
    """A copy of a packed set that is ready to be published."""
    shutil.copytree(packed, root)
    list_files(root)
    return root


def made_up_set(root, shards):
    """A set of shards with these contents, which are no tars, and with an index that is none: bytes to be cached."""
    (root / "splits").mkdir(parents=True)
    for number, content in enumerate(shards):
        (root / f"shard-{number:06}.tar").write_bytes(content)
    (root / "index.bin").write_bytes(b"index")
    write_json(
        root / "dataset.json",
        {
            "format_version": FORMAT_VERSION,
            "codec": Codec().metadata(),
            "classes": [],
            "num_videos": 0,
            "shards": [described(root, f"shard-{number:06}.tar") for number in range(len(shards))],
            "files": [described(root, "index.bin")],
        },
    )
    return root


class Folder:
    """A folder as a store has it. log: gets a line, name and bytes, for each request, also of other processes.

    change: called with (name, bytes) before an answer, and gives it. kill_after: the process dies with that answer.
    """

    def __init__(self, log, change=None, kill_after=None):
        self.log, self.change, self.kill_after = Path(log), change, kill_after
        self.log.touch()

    def cat_file(self, path, start, end):
        with open(path, "rb") as file:
            file.seek(start)
            content = file.read(end - start)
        with open(self.log, "a") as log:
            log.write(f"{Path(path).name} {len(content)}\n")
        if self.kill_after is not None:
            self.kill_after -= 1
            if self.kill_after < 0:
                os.kill(os.getpid(), signal.SIGKILL)
        return self.change(Path(path).name, content) if self.change else content

    def asked(self, name):
        """Bytes of a file that were asked for."""
        lines = (line.split(" ") for line in self.log.read_text().splitlines())
        return sum(int(num_bytes) for asked, num_bytes in lines if asked == name)


def assert_same(batch, expected):
    """Two batches are equal to the bit."""
    import torch  # here: processes that only fetch need none

    assert torch.equal(batch.inputs, expected.inputs) and torch.equal(batch.labels, expected.labels)
    for name in ("video", "tau", "crop", "mirror", "valid"):
        assert np.array_equal(getattr(batch.draw, name), getattr(expected.draw, name)), name


def store_of(root, folder):
    """A store of a set in a folder of this machine."""
    return Store(f"test://{root}", filesystem=folder, pauses_s=(0.0,))
