"""The results of Simonyan & Zisserman 2014, table by table, and the runs of ours that stand beside each number.

The only place where the paper's results are written down; what the *settings* of a run are is said by its config.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Fusion:
    """Late fusion of the spatial run of one config with the temporal run of another (sec. 2)."""

    spatial: str
    temporal: str
    method: Literal["average", "svm"]

    @property
    def name(self) -> str:
        return f"{self.spatial}+{self.temporal}:{self.method}"


#: A config's own accuracy, or that of a fusion; None: a number of others' work, which nothing here reproduces.
Source = str | Fusion | None


@dataclass(frozen=True)
class Cell:
    """One number of a table: percent, on the data set and setting that row and column name."""

    row: str
    column: str
    paper_pct: float
    source: Source = None


@dataclass(frozen=True)
class Comparison:
    """A difference that the table isolates: accuracy of `better` minus that of `than`, as the paper orders them."""

    what: str
    better: str | Fusion
    than: str | Fusion


@dataclass(frozen=True)
class Table:
    """splits: the official splits that the paper's numbers are the mean over. metric: what the percentages are."""

    name: str
    title: str
    cells: tuple[Cell, ...]
    comparisons: tuple[Comparison, ...] = ()
    splits: tuple[int, ...] = (1,)
    metric: Literal["accuracy", "top-5 error"] = "accuracy"


#: Nets that others begin with. They have no split: one run a seed serves all.
PRETRAINING = ("imagenet", "ucf101_all")

UCF_SPATIAL, UCF_TEMPORAL = "spatial_last_05", "ucf101_multitask"
HMDB_SPATIAL, HMDB_TEMPORAL = "hmdb51_spatial_last", "hmdb51_multitask"

BIDIRECTIONAL_FUSED = Fusion(UCF_SPATIAL, "bidirectional_L10", "average")
FLOW_FUSED = Fusion(UCF_SPATIAL, "flow_L10", "average")
UCF_AVERAGE, UCF_SVM = Fusion(UCF_SPATIAL, UCF_TEMPORAL, "average"), Fusion(UCF_SPATIAL, UCF_TEMPORAL, "svm")
HMDB_AVERAGE, HMDB_SVM = Fusion(HMDB_SPATIAL, HMDB_TEMPORAL, "average"), Fusion(HMDB_SPATIAL, HMDB_TEMPORAL, "svm")

TABLES = (
    Table(
        "pretraining",
        "Sec. 5: pre-training on ILSVRC-2012, top-5 error on its validation set",
        (Cell("CNN-M-2048, crops from the whole image", "top-5 error", 13.5, "imagenet"),),
        metric="top-5 error",
    ),
    Table(
        "table1a",
        "Table 1a: spatial ConvNet on UCF-101, split 1",
        (
            Cell("From scratch", "dropout 0.5", 42.5, "spatial_scratch_05"),
            Cell("From scratch", "dropout 0.9", 52.3, "spatial_scratch_09"),
            Cell("Pre-trained + fine-tuning", "dropout 0.5", 70.8, "spatial_finetune_05"),
            Cell("Pre-trained + fine-tuning", "dropout 0.9", 72.8, "spatial_finetune_09"),
            Cell("Pre-trained + last layer", "dropout 0.5", 72.7, "spatial_last_05"),
            Cell("Pre-trained + last layer", "dropout 0.9", 59.9, "spatial_last_09"),
        ),
        (
            Comparison("dropout 0.9 against 0.5, from scratch", "spatial_scratch_09", "spatial_scratch_05"),
            Comparison("dropout 0.9 against 0.5, fine-tuning", "spatial_finetune_09", "spatial_finetune_05"),
            Comparison("dropout 0.5 against 0.9, last layer", "spatial_last_05", "spatial_last_09"),
            Comparison("fine-tuning against from scratch, dropout 0.5", "spatial_finetune_05", "spatial_scratch_05"),
            Comparison("fine-tuning against from scratch, dropout 0.9", "spatial_finetune_09", "spatial_scratch_09"),
            Comparison("last layer against fine-tuning, dropout 0.5", "spatial_last_05", "spatial_finetune_05"),
        ),
    ),
    Table(
        "table1b",
        "Table 1b: temporal ConvNet on UCF-101, split 1; and slow fusion, sec. 6",
        (
            Cell("Single-frame optical flow (L = 1)", "mean subtraction", 73.9, "flow_L1"),
            Cell("Optical flow stacking (1) (L = 5)", "mean subtraction", 80.4, "flow_L5"),
            Cell("Optical flow stacking (1) (L = 10)", "no mean subtraction", 79.9, "flow_L10_nomean"),
            Cell("Optical flow stacking (1) (L = 10)", "mean subtraction", 81.0, "flow_L10"),
            Cell("Trajectory stacking (2) (L = 10)", "no mean subtraction", 79.6, "trajectory_L10_nomean"),
            Cell("Trajectory stacking (2) (L = 10)", "mean subtraction", 80.2, "trajectory_L10"),
            Cell("Optical flow stacking (1) (L = 10), bi-dir.", "mean subtraction", 81.2, "bidirectional_L10"),
            Cell("Slow fusion [14] of 11 RGB frames, from scratch", "", 56.4, "slow_fusion"),
        ),
        (
            Comparison("several fields: L = 5 against L = 1", "flow_L5", "flow_L1"),
            Comparison("several fields: L = 10 against L = 1", "flow_L10", "flow_L1"),
            Comparison("several fields: L = 10 against L = 5", "flow_L10", "flow_L5"),
            Comparison("mean subtraction, flow stacking", "flow_L10", "flow_L10_nomean"),
            Comparison("mean subtraction, trajectory stacking", "trajectory_L10", "trajectory_L10_nomean"),
            Comparison("flow against trajectory stacking", "flow_L10", "trajectory_L10"),
            Comparison("the same without mean subtraction", "flow_L10_nomean", "trajectory_L10_nomean"),
            Comparison("bi-directional against uni-directional", "bidirectional_L10", "flow_L10"),
            Comparison("flow against slow fusion of RGB frames", "flow_L10", "slow_fusion"),
        ),
    ),
    Table(
        "table2",
        "Table 2: temporal ConvNet on HMDB-51, split 1, with additional training data; and the same on UCF-101, sec. 6",
        (
            Cell("Training without additional data", "HMDB-51", 46.6, "hmdb51_scratch"),
            Cell("Fine-tuning a ConvNet, pre-trained on UCF-101", "HMDB-51", 49.0, "hmdb51_finetune"),
            Cell("Training with classes added from UCF-101", "HMDB-51", 52.8, "hmdb51_added_classes"),
            Cell("Multi-task learning on HMDB-51 and UCF-101", "HMDB-51", 55.4, "hmdb51_multitask"),
            Cell("Training without additional data", "UCF-101", 81.0, "flow_L10"),
            Cell("Multi-task learning on HMDB-51 and UCF-101", "UCF-101", 81.5, "ucf101_multitask"),
        ),
        (
            Comparison("fine-tuning against HMDB-51 alone", "hmdb51_finetune", "hmdb51_scratch"),
            Comparison("added classes against fine-tuning", "hmdb51_added_classes", "hmdb51_finetune"),
            Comparison("multi-task against added classes", "hmdb51_multitask", "hmdb51_added_classes"),
            Comparison("multi-task against HMDB-51 alone", "hmdb51_multitask", "hmdb51_scratch"),
            Comparison("multi-task against UCF-101 alone", "ucf101_multitask", "flow_L10"),
        ),
    ),
    Table(
        "table3",
        "Table 3: two-stream ConvNet on UCF-101, split 1; the spatial net is pre-trained, its last layer trained",
        (
            Cell("bi-directional", "averaging", 85.6, BIDIRECTIONAL_FUSED),
            Cell("uni-directional", "averaging", 85.9, FLOW_FUSED),
            Cell("uni-directional, multi-task", "averaging", 86.2, UCF_AVERAGE),
            Cell("uni-directional, multi-task", "SVM", 87.0, UCF_SVM),
        ),
        (
            Comparison("averaging against the temporal net", FLOW_FUSED, "flow_L10"),
            Comparison("averaging against the spatial net", FLOW_FUSED, UCF_SPATIAL),
            Comparison("uni-directional against bi-directional, fused", FLOW_FUSED, BIDIRECTIONAL_FUSED),
            Comparison("multi-task against UCF-101 alone, fused", UCF_AVERAGE, FLOW_FUSED),
            Comparison("SVM against averaging", UCF_SVM, UCF_AVERAGE),
        ),
    ),
    Table(
        "table4",
        "Table 4: mean accuracy over three splits, beside published results",
        (
            Cell("Improved dense trajectories (IDT) [26, 27]", "UCF-101", 85.9),
            Cell("Improved dense trajectories (IDT) [26, 27]", "HMDB-51", 57.2),
            Cell("IDT with higher-dimensional encodings [20]", "UCF-101", 87.9),
            Cell("IDT with higher-dimensional encodings [20]", "HMDB-51", 61.1),
            Cell("IDT with stacked Fisher encoding [21]", "HMDB-51", 66.8),
            Cell("Spatio-temporal HMAX network [11, 16]", "HMDB-51", 22.8),
            Cell('"Slow fusion" spatio-temporal ConvNet [14]', "UCF-101", 65.4),
            Cell("Spatial stream ConvNet", "UCF-101", 73.0, UCF_SPATIAL),
            Cell("Spatial stream ConvNet", "HMDB-51", 40.5, HMDB_SPATIAL),
            Cell("Temporal stream ConvNet", "UCF-101", 83.7, UCF_TEMPORAL),
            Cell("Temporal stream ConvNet", "HMDB-51", 54.6, HMDB_TEMPORAL),
            Cell("Two-stream model (fusion by averaging)", "UCF-101", 86.9, UCF_AVERAGE),
            Cell("Two-stream model (fusion by averaging)", "HMDB-51", 58.0, HMDB_AVERAGE),
            Cell("Two-stream model (fusion by SVM)", "UCF-101", 88.0, UCF_SVM),
            Cell("Two-stream model (fusion by SVM)", "HMDB-51", 59.4, HMDB_SVM),
        ),
        (
            Comparison("HMDB-51: averaging against the temporal net", HMDB_AVERAGE, HMDB_TEMPORAL),
            Comparison("HMDB-51: averaging against the spatial net", HMDB_AVERAGE, HMDB_SPATIAL),
            Comparison("HMDB-51: SVM against averaging", HMDB_SVM, HMDB_AVERAGE),
        ),
        splits=(1, 2, 3),
    ),
)


def source_name(source: str | Fusion) -> str:
    """Name of a cell's source in results: the config's, or the fusion's."""
    return source if isinstance(source, str) else source.name


def configs_of(source: Source) -> tuple[str, ...]:
    """Configs whose runs the source needs."""
    if isinstance(source, Fusion):
        return source.spatial, source.temporal
    return () if source is None else (source,)


def svm_configs() -> set[str]:
    """Configs whose training videos have to be scored too, since an SVM is fitted on them."""
    fusions = (cell.source for table in TABLES for cell in table.cells if isinstance(cell.source, Fusion))
    return {config for fusion in fusions if fusion.method == "svm" for config in configs_of(fusion)}


def select_tables(names: Iterable[str]) -> list[Table]:
    """The tables of these names, in the paper's order; "all" is every one. Other names are left out."""
    wanted = set(names)
    return [table for table in TABLES if table.name in wanted or "all" in wanted]


def describe_source(source: str | Fusion) -> str:
    """A cell's source for a reader: the config, or both and the method."""
    if isinstance(source, str):
        return source
    return f"{source.spatial} + {source.temporal}, {'SVM' if source.method == 'svm' else 'averaging'}"
