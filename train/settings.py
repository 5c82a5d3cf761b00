"""What a run is: every setting with its type and default, the paper's, and what it means.

`train.config` reads them from YAML and the command line.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

#: How a run is made, not what is trained or tested: one that was stopped may go on with other values of these.
#: `on_damage` changes batches only where a sample is damaged: so a run that damage has ended can go on over it.
CHANGEABLE = frozenset(
    {
        "data.cache",
        "data.cache_gb",
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


def require(condition: bool, message: str) -> None:
    """Raise ValueError with the message unless the condition holds."""
    if not condition:
        raise ValueError(message)


@dataclass(kw_only=True, slots=True)
class DataConfig:
    """Which samples, and what becomes of them on their way to the net."""

    root: str = "demo/packed"
    """Folder of a packed data set, made by `python -m flow.pack`, or of images by `python -m flow.images`; or
    where such a folder was copied to: s3://bucket/set, https://host/set."""
    cache: str = ""
    """Folder that keeps shards of sets that lie elsewhere; empty: two-stream in XDG_CACHE_HOME or in ~/.cache."""
    cache_gb: float = 100.0
    """Most that all in this folder may take, in 10**9 bytes."""
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
    pool_shards: int = 0
    """P: samples are drawn from a pool of so many shards that moves on through the set; for sets that a machine's cache
    does not hold. 0: from all shards, always."""
    pool_steps: int = 4
    """S: with a pool, one of its shards is exchanged for the next every S steps."""
    decoder: Literal["auto", "cpu", "mixed", "shared"] = "auto"
    """Where JPEGs are decoded if there is a GPU; `auto` measures a few batches and takes the fastest that works."""
    num_threads: int | None = None
    """Loading threads of a process; null: the machine's cores divided by its processes."""
    on_damage: Literal["raise", "skip"] = "raise"
    """What a damaged shard does to training: `skip` takes another draw of the same class in the sample's place."""
    max_damaged_pct: float = 1.0
    """With `skip`: the run fails when more than this part of its samples had to be replaced."""

    def __post_init__(self) -> None:
        require(
            self.size == "auto" or (self.size.isdecimal() and len(self.size) <= 4 and 1 <= int(self.size) <= 4096),
            f"data.size={self.size!r}: auto, the stored size, or the smaller side of the frames in px, such as 256.",
        )
        require(self.cache_gb > 0, f"data.cache_gb={self.cache_gb} must be positive, in 10**9 bytes.")
        require(self.L >= 1, f"data.L={self.L} must be at least 1.")
        require(self.rgb_frames in (1, 11), f"data.rgb_frames={self.rgb_frames}: 1, or 11, which slow fusion looks at.")
        require(self.crop_px >= 1, f"data.crop_px={self.crop_px} must be at least 1.")
        require(self.stacks_per_window >= 1, f"data.stacks_per_window={self.stacks_per_window} must be at least 1.")
        require(self.pool_shards >= 0, f"data.pool_shards={self.pool_shards} must be at least 0, which is no pool.")
        require(self.pool_steps >= 1, f"data.pool_steps={self.pool_steps} must be at least 1.")
        require(
            0 <= self.max_damaged_pct <= 100,
            f"data.max_damaged_pct={self.max_damaged_pct} is a percentage, from 0 to 100.",
        )


@dataclass(kw_only=True, slots=True)
class ModelConfig:
    """The net of both streams, CNN-M-2048."""

    width: float = 1.0
    """Factor on all channels and fully connected units."""

    def __post_init__(self) -> None:
        require(self.width > 0, f"model.width={self.width} must be positive.")


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
    """Folders, or URLs, of further packed data sets to train on."""
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
        require(0 <= self.dropout < 1, f"dropout={self.dropout} is not a ratio in [0, 1).")
        require(self.steps >= 1, f"steps={self.steps} must be at least 1.")
        require(self.lr > 0, f"lr={self.lr} must be positive.")
        require(
            self.milestones == sorted(set(self.milestones)) and all(step > 0 for step in self.milestones),
            f"milestones={self.milestones} must be positive steps in rising order.",
        )
        require(
            len(self.extra_roots) == len(self.extra_lists),
            f"extra_roots={self.extra_roots} and extra_lists={self.extra_lists}: each data set needs its list, such as "
            "split1_train or all.",
        )
        require(
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
        require(
            len(self.streams) > 0 and len(set(self.streams)) == len(self.streams),
            f"train.streams={self.streams} must name one or both of {list(STREAMS)}, each once.",
        )
        for name in ("batch_size", "log_every", "checkpoint_every", "keep_checkpoints"):
            require(getattr(self, name) >= 1, f"train.{name}={getattr(self, name)} must be at least 1.")
        require(self.seed >= 0, f"train.seed={self.seed} must be at least 0.")
        for name in ("bucket_mb", "timeout_s"):
            require(getattr(self, name) > 0, f"train.{name}={getattr(self, name)} must be positive.")
        require(
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
            require(getattr(self, name) >= least, f"eval.{name}={getattr(self, name)} must be at least {least}.")
        require(
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
        require(len(self.C) > 0 and min(self.C) > 0, f"fuse.C={self.C} must be positive numbers.")
        require(self.folds >= 2, f"fuse.folds={self.folds} must be at least 2.")


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
