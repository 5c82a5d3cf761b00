"""A shard's husk: what is left of it here when it lies elsewhere, so that the index can be built without it.

Of every clip its header, and place, size, CRC-32, range and mean of its members, compressed: all but the images. A tar
with holes for the images would not do: of each member it keeps a header, which costs a block of the disk, as much as
many a component.
"""

import hashlib
import io
import json
import zipfile
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from flow.clips import read_clips
from flow.shard import KINDS, ClipEntry, ClipHeader, write_bytes
from flow.untrusted import open_regular

#: Of a SHA-256, which is first in the file: zip's own sums cover its members only, and damage raises many things.
_DIGEST_BYTES = 32
_HEADER = [field.name for field in fields(ClipHeader)]


def write_husk(shard: Path, husk: Path) -> None:
    """Write the husk of a shard, atomically. Raises ShardError if the shard is damaged."""
    clips = list(read_clips(shard))
    headers = [
        {
            **{key: getattr(clip, key) for key in _HEADER},
            "entries": {kind: [first, len(rows)] for kind, (first, rows) in clip.entries.items()},
        }
        for clip in clips
    ]
    arrays: dict[str, Any] = {
        kind: np.concatenate([clip.entries[kind][1] for clip in clips if kind in clip.entries])
        for kind in KINDS
        if any(kind in clip.entries for clip in clips)
    }
    content = io.BytesIO()
    np.savez_compressed(content, headers=np.frombuffer(json.dumps(headers).encode(), np.uint8), **arrays)
    write_bytes(husk, hashlib.sha256(content.getvalue()).digest() + content.getvalue())


def read_husk(husk: Path) -> Iterator[ClipEntry]:
    """Every clip of the shard, as `flow.clips.read_clips` has them. Raises ValueError if the husk is damaged."""
    try:
        with open_regular(husk) as file:
            digest, packed = file.read(_DIGEST_BYTES), file.read()
        if hashlib.sha256(packed).digest() != digest:
            raise ValueError("its SHA-256 is another")
        with np.load(io.BytesIO(packed), allow_pickle=False) as content:
            headers = json.loads(content["headers"].tobytes())
            arrays = {kind: content[kind] for kind in content.files if kind != "headers"}
        at = dict.fromkeys(arrays, 0)
        for header in headers:
            entries = {}
            for kind, (first, count) in header.pop("entries").items():
                entries[kind] = first, arrays[kind][at[kind] : at[kind] + count]
                at[kind] += count
            yield ClipEntry(**header, entries=entries)
    except (ValueError, KeyError, TypeError, zipfile.BadZipFile, EOFError) as error:
        raise ValueError(
            f"{husk} is damaged: {error!r:.200}. Take it away, and run the command again: its shard is packed again."
        ) from None
