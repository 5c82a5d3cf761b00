"""What a run was made of and on: `run.json` in its folder. With it a run is of use without its packed data set.

dataset   name, fingerprint, root; classes in the order of the net's outputs; flow, codec and size_px, with which
          the videos were packed
made_on   machine, versions and commit that trained it; several where it went on on another machine
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flow.codec import Codec
from flow.shard import check_class_name, write_json
from flow.untrusted import read_json
from loaders.index import Index
from train.provenance import describe
from train.sets import open_set
from train.settings import Config

NAME = "run.json"

MAX_SIZE_PX = 4096


@dataclass(frozen=True, kw_only=True)
class Origin:
    """The data set that a run was trained on.

    fingerprint: of the packed bytes. root: the packed set's folder or URL at that time. flow: method, parameters,
    library and version; None for images. codec: as in `dataset.json`. size_px: smaller side of the frames; where files
    of another tool were packed as they were, that of the median video.
    """

    name: str | None
    fingerprint: str
    root: str
    classes: list[str]
    flow: dict[str, Any] | None
    codec: dict[str, Any]
    size_px: int


def origin_of(index: Index) -> Origin:
    """Origin of what is trained on a packed data set."""
    size_px = index.metadata.get("size_px") or int(np.median(np.minimum(index.heights, index.widths)))
    return Origin(
        name=index.metadata.get("name"),
        fingerprint=index.fingerprint,
        root=index.location,
        classes=index.classes,
        flow=index.metadata.get("flow"),
        codec=index.codec.metadata(),
        size_px=size_px,
    )


def write_origin(run: Path, index: Index) -> Path:
    """Write `run.json`; what made the run so far, as far as it is something else, is kept. Returns its path."""
    made_on = [here for here in read_made_on(run) if here != describe()] + [describe()]
    write_json(run / NAME, {"dataset": asdict(origin_of(index)), "made_on": made_on})
    return run / NAME


def read_origin(run: Path, config: Config) -> Origin:
    """Origin of a run; of one without `run.json`, of an older release, that of its packed data set.

    Raises ValueError if there is neither, or the file is damaged.
    """
    path = run / NAME
    if not path.exists():
        try:
            return origin_of(open_set(config))
        except (ValueError, OSError) as error:
            raise ValueError(f"{path} is missing, and so is the packed data set that would do: {error}") from None
    try:
        return _checked(Origin(**read_json(path)["dataset"]))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged: {error!r:.300}. Put back a copy, or run train.launch again.") from None


def read_made_on(run: Path) -> list[dict[str, Any]]:
    """Machines, versions and commits that made a run, the newest last; none if it is not known."""
    try:
        made_on = read_json(run / NAME)["made_on"]
        return [dict(here) for here in made_on]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def _checked(origin: Origin) -> Origin:
    """The origin. Raises ValueError, TypeError or KeyError unless its values are what `write_origin` writes."""
    flow = origin.flow
    sound = (
        isinstance(origin.name, str | None)
        and isinstance(origin.fingerprint, str)
        and isinstance(origin.root, str)
        and isinstance(origin.classes, list)
        and origin.classes == sorted(set(origin.classes))
        and len(origin.classes) > 0
        and (flow is None or (isinstance(flow["method"], str) and isinstance(flow.get("parameters", {}), dict)))
        and type(origin.size_px) is int
        and 1 <= origin.size_px <= MAX_SIZE_PX
    )
    if not sound:
        raise ValueError("a value is of another kind than train.launch writes")
    for name in origin.classes:
        check_class_name(name)
    Codec.from_metadata(origin.codec)
    return origin


def check_outputs(origin: Origin, config: Config, stream: str, num_outputs: int) -> None:
    """Raise ValueError unless a net with so many outputs is one for the origin's classes, and further ones if any."""
    further = bool(config.stream(stream).extra_roots)
    if num_outputs < len(origin.classes) or (num_outputs > len(origin.classes) and not further):
        raise ValueError(
            f"the {stream} net has {num_outputs} outputs, {NAME} names {len(origin.classes)} classes: they do not "
            "belong together. Put the files of one run into one folder."
        )
