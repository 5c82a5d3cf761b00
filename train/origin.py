"""What a run was made of and on: `run.json` in its folder. With it a run is of use without its packed data set.

dataset   name, fingerprint, root; classes in the order of the net's outputs; flow, codec and size_px, with which
          the videos were packed
made_on   machine, versions and commit that trained it; several where it went on on another machine
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flow.shard import write_json
from flow.untrusted import read_json
from loaders.index import Index, open_index
from train.config import Config
from train.provenance import describe

NAME = "run.json"


@dataclass(frozen=True, kw_only=True)
class Origin:
    """The data set that a run was trained on.

    fingerprint: of the packed bytes. root: the packed set's folder at that time. flow: method, parameters, library and
    version; None for images. codec: as in `dataset.json`. size_px: smaller side of the frames; None where files of
    another tool were packed as they were.
    """

    name: str | None
    fingerprint: str
    root: str
    classes: list[str]
    flow: dict[str, Any] | None
    codec: dict[str, Any]
    size_px: int | None


def origin_of(index: Index) -> Origin:
    """Origin of what is trained on a packed data set."""
    return Origin(
        name=index.metadata.get("name"),
        fingerprint=index.fingerprint,
        root=str(index.root),
        classes=index.classes,
        flow=index.metadata.get("flow"),
        codec=index.codec.metadata(),
        size_px=index.metadata.get("size_px"),
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
            return origin_of(open_index(config.data.root))
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
    """The origin, or a ValueError unless its values are of the types that `write_origin` writes."""
    sound = (
        isinstance(origin.name, str | None)
        and isinstance(origin.fingerprint, str)
        and isinstance(origin.root, str)
        and isinstance(origin.classes, list)
        and origin.classes
        and all(isinstance(name, str) for name in origin.classes)
        and isinstance(origin.flow, dict | None)
        and isinstance(origin.codec, dict)
        and (origin.size_px is None or (type(origin.size_px) is int and 16 <= origin.size_px <= 4096))
    )
    if not sound:
        raise ValueError("a value is of another type than train.launch writes")
    return origin
