"""What a run is: typed defaults (the paper's), a YAML overlay on them, and `key=value` overrides on that.

    defaults below  <-  train/configs/NAME.yaml  <-  data.root=P128 temporal.steps=300

Only this module reads or writes YAML. A run folder keeps the resolved config, so that a run can be named by its folder.
"""

from __future__ import annotations

import dataclasses
import hashlib
import types
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from flow.command import did_you_mean, folders_with, nearest, nearest_path
from flow.shard import write_bytes
from flow.untrusted import read_bounded

CONFIG_FOLDER = Path(__file__).parent / "configs"
_MAX_YAML_BYTES = 1 << 20
_MAX_LIST = 1000
_MAX_TEXT = 4096
#: Largest numbers that a run can need; other integers have 32 bits. No config asks for absurd memory by one of them.
_LARGEST: dict[str, float] = {
    "data.L": 256,
    "data.crop_px": 4096,
    "data.stacks_per_window": 256,
    "data.num_threads": 1024,
    "model.width": 16,
    "train.batch_size": 1 << 16,
    "train.bucket_mb": 1 << 16,
    "train.seed": (1 << 63) - 1,
    "eval.num_taus": 1 << 16,
    "eval.num_taus_train": 1 << 16,
    "eval.batch_size": 1 << 16,
    "fuse.folds": 1000,
}
#: How a run is made, not what is trained or tested: one that was stopped may go on with other values of these.
#: `on_damage` changes batches only where a sample is damaged: so a run that damage has ended can go on over it.
CHANGEABLE = frozenset(
    {
        "data.decoder",
        "data.max_damaged_pct",
        "data.num_threads",
        "data.on_damage",
        "eval.batch_size",
        "train.checkpoint_every",
        "train.keep_checkpoints",
        "train.log_every",
        "train.timeout_s",
    }
)
STREAMS = ("spatial", "temporal")
Stream = Literal["spatial", "temporal"]


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


@dataclass(kw_only=True, slots=True)
class DataConfig:
    """Which samples, and what becomes of them on their way to the net."""

    root: str = "demo/packed"
    """Folder of a packed data set, made by `python -m flow.pack`, or of images by `python -m flow.images`."""
    split: str = "split1"
    """Official split: trains on splits/<split>_train.txt, tests on splits/<split>_test.txt."""
    train_list: str = ""
    """List to train on: a name in splits/, or `all`, every packed video; empty: <split>_train."""
    loader: Literal["dali", "reference"] = "dali"
    """`reference` loads the same samples without DALI, slowly."""
    L: int = 10
    """Flow fields in a temporal stack, 2L channels (sec. 3.1)."""
    stacking: Literal["flow", "trajectory"] = "flow"
    """Fields sampled at the same place, eq. (1), or along the trajectory of each point, eq. (2)."""
    bidirectional: bool = False
    """L/2 forward and L/2 backward fields from the middle frame on; needs a set packed with --backward (sec. 3.1)."""
    rgb_frames: int = 1
    """RGB frames of a spatial sample; 11 makes the spatial net the "slow fusion" baseline (sec. 6)."""
    crop_px: int = 224
    """Side of the square crop, the nets' input."""
    size: str = "auto"
    """Smaller side of the frames in px; `auto` is the size they are stored at. Others are rescaled on the device, and
    their displacements with them."""
    subtract_mean: bool = True
    """Subtract from each field its mean vector (sec. 3.1)."""
    color_jitter: bool = True
    """PCA colour offset on the spatial stream in training (sec. 5)."""
    random_mirror: bool = True
    """Mirror half of the training samples."""
    stacks_per_window: int = 1
    """k: in temporal training, L + k - 1 fields are decoded once and give k stacks, in different batches."""
    decoder: Literal["auto", "cpu", "mixed", "shared"] = "auto"
    """Where JPEGs are decoded if there is a GPU; `auto` measures a few batches and takes the fastest that works."""
    num_threads: int | None = None
    """Loading threads of a process; null: the machine's cores divided by its processes."""
    on_damage: Literal["raise", "skip"] = "raise"
    """What a damaged shard does to training: `skip` takes another draw of the same class in the sample's place."""
    max_damaged_pct: float = 1.0
    """With `skip`: the run fails when more than this part of its samples had to be replaced."""

    def __post_init__(self) -> None:
        _require(
            self.size == "auto" or (self.size.isdecimal() and len(self.size) <= 4 and 1 <= int(self.size) <= 4096),
            f"data.size={self.size!r}: auto, the stored size, or the smaller side of the frames in px, such as 256.",
        )
        _require(self.L >= 1, f"data.L={self.L} must be at least 1.")
        _require(
            self.rgb_frames in (1, 11), f"data.rgb_frames={self.rgb_frames}: 1, or 11, which slow fusion looks at."
        )
        _require(self.crop_px >= 1, f"data.crop_px={self.crop_px} must be at least 1.")
        _require(self.stacks_per_window >= 1, f"data.stacks_per_window={self.stacks_per_window} must be at least 1.")
        _require(
            0 <= self.max_damaged_pct <= 100,
            f"data.max_damaged_pct={self.max_damaged_pct} is a percentage, from 0 to 100.",
        )


@dataclass(kw_only=True, slots=True)
class ModelConfig:
    """The net of both streams, CNN-M-2048."""

    width: float = 1.0
    """Factor on all channels and fully connected units."""

    def __post_init__(self) -> None:
        _require(self.width > 0, f"model.width={self.width} must be positive.")


@dataclass(kw_only=True, slots=True)
class StreamConfig:
    """Training of one stream. Defaults: from scratch as in sec. 5, dropout as in sec. 6.

    `extra_roots` are further data sets to learn from (sec. 4); the run is tested on `data.root`, and on each of them
    whose list is a split's.
    """

    dropout: float = 0.9
    """Ratio of units dropped in full6 and full7."""
    steps: int = 80_000
    """Updates in all."""
    lr: float = 1e-2
    """Learning rate of the first phase."""
    milestones: list[int] = field(default_factory=lambda: [50_000, 70_000])
    """Steps at which the learning rate is divided by 10."""
    init: str = ""
    """Checkpoint whose weights training begins with; the last layer always begins anew. Empty: from scratch."""
    train_layers: Literal["all", "last"] = "all"
    """`last`: only the last (classification) layer learns (sec. 6)."""
    extra_roots: list[str] = field(default_factory=list)
    """Folders of further packed data sets to train on."""
    extra_lists: list[str] = field(default_factory=list)
    """The list of each to train on, such as `split1_train`, or `all`."""
    extra_as: Literal["tasks", "classes"] = "tasks"
    """`tasks`: each set has a softmax layer and a loss (sec. 4); `classes`: its classes join the first set's."""
    extra_classes: str = ""
    """With `classes`, which to add: a file of names, one a line, or the name of one in train/configs; empty: all."""
    batch_share: Literal["classes", "videos", "equal"] = "classes"
    """A set's share of a batch: in proportion to its classes, as if drawn over the classes of all; to its training
    videos; or the same for each."""

    def __post_init__(self) -> None:
        _require(0 <= self.dropout < 1, f"dropout={self.dropout} is not a ratio in [0, 1).")
        _require(self.steps >= 1, f"steps={self.steps} must be at least 1.")
        _require(self.lr > 0, f"lr={self.lr} must be positive.")
        _require(
            self.milestones == sorted(set(self.milestones)) and all(step > 0 for step in self.milestones),
            f"milestones={self.milestones} must be positive steps in rising order.",
        )
        _require(
            len(self.extra_roots) == len(self.extra_lists),
            f"extra_roots={self.extra_roots} and extra_lists={self.extra_lists}: each data set needs its list, such as "
            "split1_train or all.",
        )
        _require(
            self.train_layers == "all" or bool(self.init),
            "train_layers=last trains on top of a trained net: give its checkpoint as init.",
        )


@dataclass(kw_only=True, slots=True)
class TrainConfig:
    """What both streams' training shares."""

    streams: list[Stream] = field(default_factory=lambda: ["spatial", "temporal"])
    """Streams to train, in this order."""
    batch_size: int = 256
    """Samples of an update over all processes; each process takes an equal slice."""
    momentum: float = 0.9
    weight_decay: float = 5e-4
    """As in the paper's reference [15]."""
    seed: int = 0
    """Of initial weights, samples and dropout masks."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """`auto`: bfloat16 autocast on a GPU, float32 on the CPU."""
    compile: bool = False
    """Compile the net with torch.compile."""
    bucket_mb: float = 25.0
    """Gradients travel between processes in buckets of this size (2**20 bytes), while the backward pass goes on."""
    gradient_compression: Literal["none", "bfloat16"] = "none"
    """`bfloat16` rounds gradients on their way, which halves the bytes; they are applied in float32."""
    clip_grad_norm: float | None = None
    """Scale a gradient whose norm, over all parameters, is larger than this down to it; null: no clipping."""
    timeout_s: float = 300.0
    """Longest time for a batch, for an update, or for the other processes, before the run fails and says for what it
    waited. torch.compile works in the first update."""
    log_every: int = 20
    """Steps from log line to log line."""
    checkpoint_every: int = 1000
    """Steps from checkpoint to checkpoint; there is always one after the last step."""
    keep_checkpoints: int = 2
    """Checkpoints to keep: if the newest is damaged, training goes on from the one before."""

    def __post_init__(self) -> None:
        _require(
            len(self.streams) > 0 and len(set(self.streams)) == len(self.streams),
            f"train.streams={self.streams} must name one or both of {list(STREAMS)}, each once.",
        )
        for name in ("batch_size", "log_every", "checkpoint_every", "keep_checkpoints"):
            _require(getattr(self, name) >= 1, f"train.{name}={getattr(self, name)} must be at least 1.")
        _require(self.seed >= 0, f"train.seed={self.seed} must be at least 0.")
        for name in ("bucket_mb", "timeout_s"):
            _require(getattr(self, name) > 0, f"train.{name}={getattr(self, name)} must be positive.")
        _require(
            self.clip_grad_norm is None or self.clip_grad_norm > 0,
            f"train.clip_grad_norm={self.clip_grad_norm} must be positive, or null for no clipping.",
        )


@dataclass(kw_only=True, slots=True)
class EvalConfig:
    """Testing: class scores averaged over num_taus x 10 views of a video (sec. 5)."""

    num_taus: int = 25
    """Stacks of a test video, at equal spacing; 0: no test, for a net that only serves as another's beginning."""
    num_taus_train: int = 5
    """The same for the training videos, whose scores the SVM is fitted on; 0: none, and no SVM."""
    batch_size: int = 32
    """Views of a forward pass in one process."""

    @property
    def paper_taus(self) -> int:
        """Stacks of a video that is scored apart from the run: its own number, or the paper's if it had no test."""
        return self.num_taus or 25

    def __post_init__(self) -> None:
        for name, least in (("num_taus", 0), ("num_taus_train", 0), ("batch_size", 1)):
            _require(getattr(self, name) >= least, f"eval.{name}={getattr(self, name)} must be at least {least}.")
        _require(
            self.num_taus > 0 or self.num_taus_train == 0,
            f"eval.num_taus=0 with eval.num_taus_train={self.num_taus_train}: training videos are scored for an SVM, "
            "which needs a test; set both to 0.",
        )


@dataclass(kw_only=True, slots=True)
class FuseConfig:
    """Fusion by SVM (sec. 2)."""

    C: list[float] = field(default_factory=lambda: [0.01, 0.1, 1.0, 10.0, 100.0])
    """Regularisation strengths that cross-validation on the training videos chooses from."""
    folds: int = 5
    """Folds of the cross-validation; a group of related videos is never divided."""

    def __post_init__(self) -> None:
        _require(len(self.C) > 0 and min(self.C) > 0, f"fuse.C={self.C} must be positive numbers.")
        _require(self.folds >= 2, f"fuse.folds={self.folds} must be at least 2.")


@dataclass(kw_only=True, slots=True)
class Config:
    """A whole run: both streams' training, evaluation and fusion."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    spatial: StreamConfig = field(default_factory=StreamConfig)
    temporal: StreamConfig = field(default_factory=StreamConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    fuse: FuseConfig = field(default_factory=FuseConfig)

    def stream(self, name: str) -> StreamConfig:
        """The section of a stream."""
        return {"spatial": self.spatial, "temporal": self.temporal}[name]


def resolve_config(name_or_file: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Defaults, overlaid by a config of `train/configs` or a YAML file, overlaid by `key=value` strings.

        resolve_config("demo", ["temporal.steps=50", "train.streams=[temporal]", "fuse.C=[1, 10]"])

    Raises ValueError naming the key for an unknown key (with the nearest known one), a wrong type, a value out of range
    or a key that is not `section.name=value`; and the known configs for an unknown name.
    """
    flat = _flatten(_read_yaml(_find_config(name_or_file)))
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            example = f"A config is named by --config {key}" if key in config_names() else "Example: temporal.steps=300"
            raise ValueError(f"override {override!r:.200} is not of the form key=value. {example}.")
        try:
            flat[key.strip()] = _parse_yaml(text)
        except ValueError as error:
            raise ValueError(f"override {override!r:.200} is not YAML: {error}") from None
    return from_flat(flat)


def read_config(path: Path) -> Config:
    """The resolved config that `write_config` stored in a run folder.

    Raises FileNotFoundError if there is none, ValueError as `resolve_config` does.
    """
    try:
        return from_flat(_flatten(_read_yaml(path)))
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(f"{path.parent} is no run folder: no {path.name}.{_nearest_run(path)}") from None


def _nearest_run(path: Path) -> str:
    """Which run may be meant by the folder of a config that is not there."""
    if near := nearest_path(path.parent):
        return near
    run = path.parent
    around = [run.parent] * (run.parent / path.name).exists() + folders_with(run, path.name)
    return f" Did you mean {str(around[0])!r}?" if around else " Give a run folder of `python -m train.launch`."


def write_config(config: Config, path: Path) -> None:
    """Store the resolved config as YAML."""
    write_bytes(path, yaml.safe_dump(dataclasses.asdict(config), sort_keys=False).encode())


def to_flat(config: Config) -> dict[str, Any]:
    """Config -> {"data.root": "...", "data.split": "split1", ...}: plain values by dotted key."""
    return _flatten(dataclasses.asdict(config))


def from_flat(flat: Mapping[str, Any]) -> Config:
    """Inverse of `to_flat`; keys that are left out keep their defaults. Raises ValueError as `resolve_config` does."""
    sections = get_type_hints(Config)
    known = {f"{name}.{key}": hint for name in sections for key, hint in get_type_hints(sections[name]).items()}
    values: dict[str, dict[str, Any]] = {name: {} for name in sections}
    for key, value in flat.items():
        if key not in known:
            raise ValueError(f"unknown config key {key!r:.200}.{_nearest_keys(key, list(known))}")
        section, name = key.split(".")
        values[section][name] = _bounded(key, _coerce(key, value, known[key]))
    return Config(**{name: sections[name](**values[name]) for name in sections})


def _nearest_keys(key: str, known: Sequence[str]) -> str:
    """The keys that an unknown one may mean.

    train, a section          such as train.streams
    temporl.steps             temporal.steps, the name in the section that is nearest
    steps, train.steps        spatial.steps or temporal.steps, the name in other sections
    temporl.step, step        the nearest name in that section, or in all
    """
    section, dot, name = key.rpartition(".")
    names: dict[str, list[str]] = {}  # section -> names of its keys
    for whole in known:
        names.setdefault(whole.partition(".")[0], []).append(whole.partition(".")[2])
    if key in names:
        return f" A key is section.name, such as {key}.{names[key][0]}."
    meant = nearest(section, names) if dot else None
    own = names[meant] if meant else []
    if name in own:
        near = [f"{meant}.{name}"]
    elif name in (all_names := sum(names.values(), [])):
        near = [f"{other}.{name}" for other in names if name in names[other]]
    elif dot:
        near = [f"{meant}.{found}" for found in [nearest(name, own)] if found]
    else:
        found = nearest(name, all_names)
        near = [f"{other}.{found}" for other in names if found in names[other]]
    if near:
        return f" Did you mean {' or '.join(map(repr, near))}?"
    return (
        f" A key is section.name; those of {meant}: {', '.join(own)}."
        if own
        else (f" A key is section.name; sections are {', '.join(names)}.")
    )


def differing_keys(stored: Config, asked: Config) -> list[str]:
    """Descriptions such as "train.seed: stored 0, asked 1" of keys in which configs differ; CHANGEABLE ones may."""
    old, new = to_flat(stored), to_flat(asked)
    return [
        f"{key}: stored {old[key]!r}, asked {new[key]!r}"
        for key in old
        if old[key] != new[key] and key not in CHANGEABLE
    ]


def short_hash(config: Config, ignored: Collection[str] = ()) -> str:
    """Eight hexadecimal digits of all values that are not the defaults, so that a new key changes nothing.

    ignored: keys that do not count either.
    """
    default = to_flat(Config())
    own = sorted((key, value) for key, value in to_flat(config).items() if value != default[key] and key not in ignored)
    return hashlib.sha256(repr(own).encode()).hexdigest()[:8]


def config_names() -> list[str]:
    """Names of the configs in train/configs."""
    return sorted(path.stem for path in CONFIG_FOLDER.glob("*.yaml"))


def _find_config(name_or_file: str | Path) -> Path:
    if Path(name_or_file).suffix in (".yaml", ".yml"):
        path = Path(name_or_file)
        near = did_you_mean(path.stem, config_names()) if path.name == str(name_or_file) else ""
        _require(path.is_file(), f"config file {str(path)!r} does not exist.{near or nearest_path(path)}")
        return path
    path = CONFIG_FOLDER / f"{name_or_file}.yaml"
    names = config_names()
    if not path.is_file():
        known = f"{', '.join(names)}, or a path to a .yaml file"
        raise ValueError(f"unknown config {name_or_file!r}; known: {known}.{did_you_mean(str(name_or_file), names)}")
    return path


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = _parse_yaml(read_bounded(path, _MAX_YAML_BYTES).decode("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not YAML: {error}") from None
    content = {} if content is None else content
    _require(isinstance(content, dict), f"{path} must hold sections such as `train:` with keys, not {content!r:.200}.")
    return content


class _PlainLoader(yaml.SafeLoader):
    """YAML of plain values: an alias could stand for billions of values, and a tag is none of a config's business."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or getattr(event, "tag", None) or event.anchor:
            raise yaml.YAMLError(f"an alias, anchor or tag, expected plain values{event.start_mark}")
        return super().compose_node(parent, index)


def _parse_yaml(text: str) -> Any:
    """Value of a YAML text. Raises ValueError for what is none."""
    try:
        return yaml.load(text, _PlainLoader)
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(str(error)) from None


def _flatten(tree: Mapping[str, Any]) -> dict[str, Any]:
    """{"train": {"seed": 0}} -> {"train.seed": 0}; a section without keys, or a key outside one, stays as it is."""
    flat = {}
    for section, content in tree.items():
        if isinstance(content, Mapping):
            flat.update({f"{section}.{name}": value for name, value in content.items()})
        elif content is not None or section not in get_type_hints(Config):
            flat[str(section)] = content
    return flat


def _coerce(key: str, value: Any, hint: Any) -> Any:
    """`value` as the annotated type, or a ValueError that names key, value and type."""
    if get_origin(hint) is list:
        if isinstance(value, list):
            return [_coerce(key, item, get_args(hint)[0]) for item in value]
    elif get_origin(hint) is Literal:
        if value in get_args(hint):
            return value
        near = did_you_mean(str(value), get_args(hint))
        raise ValueError(f"{key}={value!r:.200} must be one of {', '.join(get_args(hint))}.{near}")
    elif get_origin(hint) in (Union, types.UnionType):  # only X | None here
        return None if value is None else _coerce(key, value, get_args(hint)[0])
    elif hint is float:
        try:  # YAML 1.1 reads 1e-2 as a string: it wants 1.0e-2
            return float(value) if not isinstance(value, bool) else float("x")
        except (TypeError, ValueError, OverflowError):
            pass
    elif type(value) is hint:  # not isinstance: True is an int
        return value
    elif hint is str and isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)  # data.root=128 is a folder name
    expected = hint.__name__ if isinstance(hint, type) and get_origin(hint) is None else str(hint)
    raise ValueError(f"{key}={value!r:.200} is of type {type(value).__name__}; expected {expected}.")


def _bounded(key: str, value: Any) -> Any:
    """`value`, or a ValueError if it, or one in it, is out of all proportion."""
    if isinstance(value, list):
        _require(len(value) <= _MAX_LIST, f"{key} has {len(value)} values; expected at most {_MAX_LIST}.")
        for item in value:
            _bounded(key, item)
    elif isinstance(value, str):
        _require(len(value) <= _MAX_TEXT, f"{key} has {len(value)} characters; expected at most {_MAX_TEXT}.")
    elif value is not None:
        largest = _LARGEST.get(key, 1 << 31)
        _require(abs(value) <= largest, f"{key}={value}: expected a number of at most {largest}.")  # NaN is none
    return value
