"""The state of one stream's training in one file: weights, optimizer, step, config; and the files before it.

checkpoint.pt      the newest
checkpoint.pt.1    the one before
checkpoint.pt.2    the one before that, ...
"""

from __future__ import annotations

import os
import pickletools
import re
import zipfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from flow.command import nearest_path
from flow.shard import publish
from flow.untrusted import open_regular, printable
from train.disk import writing
from train.settings import STREAMS

FORMAT_VERSION = 1
MAX_STEP_BITS = 31
_FIELDS = {"stream": str, "step": int, "net": dict, "optimizer": dict, "config": dict, "dataset": str}

#: All that the pickle in a checkpoint may name: tensors, and the dict of a state.
_NAMES = re.compile(r"torch\._utils _rebuild_tensor_v2|collections OrderedDict|torch \w+Storage")


class DamagedCheckpointError(ValueError):
    """A checkpoint's bytes are not what was written, or never were a checkpoint."""


@dataclass
class Checkpoint:
    """What training needs to go on as if it had not been stopped.

    stream: "spatial" or "temporal". step: updates done. net, optimizer: state dicts, the net's without wrappers.
    config: the run's resolved config by dotted key. dataset: fingerprint of the packed data set.
    There is no generator state: samples and masks follow from (seed, step).
    """

    stream: str
    step: int
    net: dict[str, Any]
    optimizer: dict[str, Any]
    config: dict[str, Any]
    dataset: str


def save_checkpoint(checkpoint: Checkpoint, path: Path, *, keep: int = 1) -> None:
    """Write the checkpoint atomically and keep `keep` in all: at every instant a whole one has a known name.

    Raises OSError that names the file; what was there before is as it was.
    """
    state = {name: getattr(checkpoint, name) for name in _FIELDS}
    temporary = path.with_name(path.name + ".tmp")
    with writing(path):
        try:
            with open(temporary, "wb") as file:
                torch.save({"format_version": FORMAT_VERSION, **state}, file)
                file.flush()
                os.fsync(file.fileno())
        except (OSError, RuntimeError) as error:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)  # it takes the space that is wanting
            if isinstance(error, RuntimeError) and isinstance(error.__context__, OSError):
                raise error.__context__ from error  # torch's writer covers the disk's own words
            raise
        for number in range(keep - 1, 0, -1):
            with suppress(FileNotFoundError):
                os.replace(_older(path, number - 1), _older(path, number))
        publish(temporary, path)


def load_checkpoint(path: Path, *, dataset: str | None = None) -> Checkpoint:
    """Read a checkpoint onto the CPU; tensors and plain values only, never code.

    Args:
        dataset: fingerprint of the packed data set in use; None accepts any.
    Raises FileNotFoundError if there is none, DamagedCheckpointError if a byte is not what was written, ValueError if
    the file is of another version or belongs to another data set.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}: train this stream first.{nearest_path(path.parent)}")
    try:
        _check_archive(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # bytes from anywhere make the readers raise almost anything
        raise _damaged(path, (str(error) or type(error).__name__).splitlines()[0]) from error
    version = state.get("format_version") if isinstance(state, dict) else None
    if version != FORMAT_VERSION:
        found = version if isinstance(version, int) else "none"
        raise ValueError(f"{path} has checkpoint format {found}; this program reads {FORMAT_VERSION}.")
    for name, kind in _FIELDS.items():
        if not isinstance(state.get(name), kind):
            raise _damaged(path, f"{name} is a {type(state.get(name)).__name__}, expected a {kind.__name__}")
    checkpoint = Checkpoint(**{name: state[name] for name in _FIELDS})
    if wrong := _what_is_wrong(checkpoint):
        raise _damaged(path, wrong)
    if dataset is not None and checkpoint.dataset != dataset:
        raise ValueError(
            f"{path} was trained on data set {checkpoint.dataset}, not on {dataset}, which data.root and extra_roots "
            "hold now; put the old data set back or start another run."
        )
    return checkpoint


def checkpoint_files(path: Path) -> list[Path]:
    """The checkpoints that are kept under this name, the newest first."""
    numbers = [int(file.name.rpartition(".")[2]) for file in path.parent.glob(f"{path.name}.*") if _is_numbered(file)]
    return [file for file in (_older(path, number) for number in (0, *sorted(numbers))) if file.is_file()]


def load_newest(path: Path, *, dataset: str | None = None) -> tuple[Checkpoint | None, list[Path]]:
    """The newest checkpoint that is whole, None if none was ever written; and the newer ones, which are damaged.

    Raises ValueError if all are damaged, and as `load_checkpoint` does.
    """
    damaged: list[Path] = []
    for file in checkpoint_files(path):
        try:
            return load_checkpoint(file, dataset=dataset), damaged
        except DamagedCheckpointError as error:
            damaged.append(file)
            last_error = error
    if damaged:
        raise ValueError(
            f"{', '.join(file.name for file in damaged)} in {path.parent}: no checkpoint is whole; the last: "
            f"{last_error} Or start over with --resume never."
        )
    return None, []


def load_state(target: torch.nn.Module | torch.optim.Optimizer, state: dict[str, Any], path: Path) -> None:
    """Load a checkpoint's state into a net or an optimizer. Raises ValueError if it is that of another.

    Of an optimizer's, the momentum alone: the config has the rest.
    """
    try:
        if isinstance(target, torch.optim.Optimizer):
            own = target.state_dict()
            target.load_state_dict({**own, "state": _momentum(target, state)})
        else:
            target.load_state_dict(state)
    except Exception as error:  # a state that is none makes torch raise almost anything
        raise ValueError(f"{path} is of another net than this config's: {str(error)[:1000]}") from error


def set_aside(file: Path, path: Path) -> Path:
    """Rename a bad checkpoint, or the next save would keep it in the place of a good one. Returns its new name."""
    aside = path.with_name(f"{path.name}.damaged")
    os.replace(file, aside)
    return aside


def _momentum(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """The state of each parameter by its number. Raises ValueError, KeyError, ... if they are not this optimizer's.

    Torch would find another shape in the next step only.
    """
    parameters = dict(enumerate(parameter for group in optimizer.param_groups for parameter in group["params"]))
    for number, entry in state["state"].items():
        for name, value in entry.items():
            wanted = parameters[number]
            if name != "momentum_buffer" or (
                value is not None and (value.shape, value.dtype) != (wanted.shape, wanted.dtype)
            ):
                raise ValueError(
                    f"{name} of parameter {number} is not a momentum of {tuple(wanted.shape)} {wanted.dtype}"
                )
    return state["state"]


def _what_is_wrong(checkpoint: Checkpoint) -> str | None:
    """What no checkpoint of ours holds, or None: values that take more memory or time than the file's size suggests."""
    if checkpoint.step.bit_length() > MAX_STEP_BITS:
        return f"a step of {checkpoint.step.bit_length()} bits"
    if checkpoint.step < 0 or checkpoint.stream not in STREAMS:
        return f"step {checkpoint.step} of stream {checkpoint.stream[:20]!r}"
    if not all(isinstance(key, str) and _is_plain(value) for key, value in checkpoint.config.items()):
        return "config holds more than plain values by their names"
    if not all(isinstance(name, str) and _is_whole(value) for name, value in checkpoint.net.items()):
        return "net holds more than whole tensors by their names"
    momenta = checkpoint.optimizer.get("state", {})
    if not isinstance(momenta, dict) or not all(
        isinstance(number, int)
        and isinstance(entry, dict)
        and all(value is None or _is_whole(value) for value in entry.values())
        for number, entry in momenta.items()
    ):
        return "optimizer holds more than whole tensors"
    return None


def _is_plain(value: object) -> bool:
    """Whether this is what a config holds: a list in a list could be in itself, or stand for billions of values."""
    return all(
        isinstance(item, (str, int, float)) or item is None for item in (value if isinstance(value, list) else [value])
    )


def _is_whole(value: object) -> bool:
    """Whether this is a tensor that has all of its elements in the file: one element may pass for billions."""
    return isinstance(value, torch.Tensor) and value.nbytes <= value.untyped_storage().nbytes()


def _older(path: Path, number: int) -> Path:
    """The checkpoint `number` saves before the newest."""
    return path.with_name(f"{path.name}.{number}") if number else path


def _is_numbered(file: Path) -> bool:
    return re.fullmatch(r"[1-9][0-9]{0,8}", file.name.rpartition(".")[2], re.ASCII) is not None


def _check_archive(path: Path) -> None:
    """Compare every member with its CRC-32, which torch does not, and see what the pickle names.

    Raises ValueError, zipfile.BadZipFile, and what zipfile and pickletools do when they meet other bytes.
    """
    with open_regular(path) as file, zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        if any(member.compress_type != zipfile.ZIP_STORED for member in members):
            raise ValueError("a compressed member, which torch does not write")
        if sum(member.file_size for member in members) > path.stat().st_size:
            raise ValueError("members larger than the file")
        broken = archive.testzip()
        if broken is not None:
            raise ValueError(f"the bytes of {broken} do not match their CRC-32")
        (pickled,) = [member for member in members if member.filename.endswith("/data.pkl")]
        for code, name, _ in pickletools.genops(archive.read(pickled)):
            if code.name in ("GLOBAL", "STACK_GLOBAL", "INST", "EXT1", "EXT2", "EXT4") and not _NAMES.fullmatch(
                str(name)
            ):
                raise ValueError(f"it names {name}, which no checkpoint needs")


def _damaged(path: Path, why: str) -> DamagedCheckpointError:
    return DamagedCheckpointError(
        f"{path} is damaged ({printable(why)}). Put back a copy, or delete it: training then goes on from the "
        "checkpoint before it, or begins again."
    )
