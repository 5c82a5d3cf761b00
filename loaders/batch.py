"""What goes into a loader and what comes out."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch

    from loaders.draw import Draw

#: The temporal net's input is displacement in px (of the frames that crops are cut from), after mean subtraction, times
#: this. On real clips px/frame has a standard deviation of 1.1 (frames of 128 px) to 1.3 (256 px), near the 1 that He
#: initialisation expects.
FLOW_SCALE = 1.0

#: ImageNet's RGB statistics in grey levels: the spatial net's input is (x - mean) / std.
RGB_MEAN = np.array([123.675, 116.28, 103.53], np.float32)
RGB_STD = np.array([58.395, 57.12, 57.375], np.float32)

#: Principal components of ImageNet's RGB values: rows are red, green, blue; a column times its standard deviation
#: (grey levels) times alpha ~ N(0, 0.1) is the colour offset of Krizhevsky et al. 2012, sec. 4.1.
PCA_VECTORS = np.array([[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]], np.float32)
PCA_STD = 255 * np.array([0.2175, 0.0188, 0.0045], np.float32)
PCA_ALPHA_STD = 0.1


@dataclass(frozen=True, kw_only=True)
class StreamSpec:
    """What one stream's net takes in.

    stream: "spatial", RGB frames; or "temporal", L stacked fields, 2L channels (sec. 3.1, eq. 1).
    crop_px: side of the square crop.
    size_px: smaller side that frames are rescaled to before crops are cut; None: as they are stored.
    subtract_mean: from each field its own mean vector (sec. 3.1). Temporal only.
    stacking: "flow", fields sampled at one place, eq. (1); "trajectory", along trajectories, eq. (2). Temporal only.
    bidirectional: L/2 forward fields and L/2 backward ones, away from the middle frame tau. Temporal only.
    rgb_frames: consecutive frames of a sample, 3 channels each. Spatial only.
    color_jitter: PCA colour offset in training (sec. 5, after its reference [15]). Spatial only.
    random_mirror: mirror half of the training samples.
    stacks_per_window: k; in training a window of L + k - 1 fields is decoded once and gives k stacks. Temporal only.
    """

    stream: str
    L: int = 10
    crop_px: int = 224
    subtract_mean: bool = True
    stacking: str = "flow"
    bidirectional: bool = False
    rgb_frames: int = 1
    color_jitter: bool = True
    random_mirror: bool = True
    stacks_per_window: int = 1
    size_px: int | None = None

    def __post_init__(self) -> None:
        if self.stream not in ("spatial", "temporal") or self.stacking not in ("flow", "trajectory"):
            raise ValueError(
                f"stream={self.stream!r} is 'spatial' or 'temporal', stacking={self.stacking!r} is 'flow' or "
                "'trajectory'."
            )
        if self.L < 1 or self.crop_px < 1 or self.rgb_frames < 1:
            raise ValueError(f"L={self.L}, crop_px={self.crop_px}, rgb_frames={self.rgb_frames}: all are at least 1.")
        if self.size_px is not None and self.size_px < 1:
            raise ValueError(f"size_px={self.size_px} is at least 1, or None for the stored size.")
        if self.bidirectional and self.L % 2:
            raise ValueError(f"L={self.L}: a bi-directional stack has L/2 fields to each side; take an even L.")
        if self.stacks_per_window < 1 or (self.stacks_per_window > 1 and not self._shares_windows):
            raise ValueError(
                f"stacks_per_window={self.stacks_per_window} with stream={self.stream}, stacking={self.stacking}, "
                f"bidirectional={self.bidirectional}: at least 1, and only forward stacks of flow, eq. (1), share "
                "what is decoded; take 1."
            )

    @property
    def _shares_windows(self) -> bool:
        return self.is_temporal and self.stacking == "flow" and not self.bidirectional

    @property
    def is_temporal(self) -> bool:
        return self.stream == "temporal"

    @property
    def follows_trajectories(self) -> bool:
        return self.is_temporal and self.stacking == "trajectory"

    @property
    def kinds(self) -> tuple[str, ...]:
        """Member kinds of one time step, in channel order; those of the backward half are `backward_kinds`."""
        return ("dx", "dy") if self.is_temporal else ("rgb",)

    @property
    def backward_kinds(self) -> tuple[str, ...]:
        return ("bdx", "bdy") if self.is_temporal and self.bidirectional else ()

    @property
    def num_chains(self) -> int:
        """Directions in time that a sample goes from tau: 1, or 2."""
        return 2 if self.backward_kinds else 1

    @property
    def steps(self) -> int:
        """Time steps of a sample: its RGB frames, or L fields."""
        return self.L if self.is_temporal else self.rgb_frames

    @property
    def chain_steps(self) -> int:
        """Time steps of a sample in one direction: L, or L/2 of a bi-directional stack."""
        return self.steps // self.num_chains

    @property
    def window_steps(self) -> int:
        """Time steps of a window: those of k samples that start one after the other."""
        return self.steps + self.stacks_per_window - 1

    @property
    def frames_needed(self) -> int:
        """Frames a video must have to hold one sample: those of the sample, or L + 1."""
        return self.L + 1 if self.is_temporal else self.rgb_frames

    @property
    def frames_before(self) -> int:
        """Frames that a sample reaches back from tau: 0, or L/2 of a bi-directional stack."""
        return self.chain_steps if self.num_chains > 1 else 0

    @property
    def num_images(self) -> int:
        """Encoded images of one sample: its RGB JPEGs, or 2L components."""
        return self.steps * len(self.kinds)

    @property
    def num_channels(self) -> int:
        """Channels of one sample: 3 a frame, or 2L."""
        return 2 * self.L if self.is_temporal else 3 * self.rgb_frames


@dataclass(frozen=True)
class Batch:
    """What a loader delivers. n samples:

    inputs  (n, C, crop, crop) float32 on the device: normalised RGB, or px/frame * FLOW_SCALE
    labels  (n,) int64 on the device
    draw    what was drawn: video, tau, crop, mirror, ... of each sample; a test batch is one of the ten views of it.
            With several data sets video is a row of the sample's own set, whose samples follow those of the set before
    task    (n,) int64 on the device: which softmax layer and loss each sample is for; 0 where there is one
    """

    inputs: "torch.Tensor"
    labels: "torch.Tensor"
    draw: "Draw"
    task: "torch.Tensor | None" = None
