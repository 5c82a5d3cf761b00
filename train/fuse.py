"""Late fusion of streams and the final table: `python -m train.fuse A [B C ...] [--weights 1 2 ...]`.

Each argument is a run folder, which stands for all its streams, or a stream's folder, such as RUN/temporal or
RUN/temporal/task1. Two ways (sec. 2): the average of the softmax scores, weighted if asked for, and a multi-class
linear SVM on stacked L2-normalised scores, which finds its weights itself.

The SVM, with its C, is fitted on the *training* videos' scores; test videos are only predicted. Caution: the nets have
seen the training videos, so those scores are over-confident: they hardly show which stream errs where, and where the
nets fit their training set perfectly the SVM has nothing to learn.
"""

from __future__ import annotations

import hashlib
import math
import re
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import GroupKFold
from sklearn.svm import LinearSVC
from tqdm import tqdm

from flow.command import Parser, describe_error, nearest_path
from train.config import read_config
from train.results import Floats, Ints, Results, Source, report, write_results
from train.scores import Scores, check_aligned, read_scores, score_file
from train.settings import STREAMS, FuseConfig

TITLES = {
    "spatial": "Spatial ConvNet",
    "temporal": "Temporal ConvNet",
    "average": "Two-stream, averaging",
    "svm": "Two-stream, SVM",
}


# --- the two ways ------------------------------------------------------------------------------------------------


def average(streams: Sequence[Floats], weights: Sequence[float] | None = None) -> Floats:
    """Mean of the streams' softmax scores: list of (V, K) -> (V, K), rows sum to 1."""
    return np.average(streams, axis=0, weights=weights)


def svm_features(streams: Sequence[Floats]) -> Floats:
    """Each stream's score vector divided by its L2 norm, stacked: list of S times (V, K) -> (V, S * K)."""
    return np.concatenate([scores / np.linalg.norm(scores, axis=1, keepdims=True) for scores in streams], axis=1)


def source_group(video_id: str) -> str:
    """Name shared by the videos cut from one source, which cross-validation must not divide.

    UCF-101   Archery/v_Archery_g01_c04                         -> Archery/v_Archery_g01
    HMDB-51   wave/Fellowship_5_wave_u_cm_np1_fr_med_0          -> Fellowship_5
    images    Archery/v_Archery_g01_c04/000010                  -> as the video whose frame it is
    others    the video id: every video is a group of its own
    """
    # A frame has a class and a video before its six digits; an image n01440764/000017, or val/t-1/000017 of a tar, not.
    if match := re.fullmatch(r"((?:(?:train|val)/)?+[^/]+/.+)/\d{6}", video_id):
        return source_group(match[1])
    if match := re.fullmatch(r"(.+_g\d+)_c\d+", video_id):
        return match[1]
    folder, _, stem = video_id.rpartition("/")
    if match := re.fullmatch(r"(.+)_[fhlu]_(?:cm|nm)_np\d_(?:fr|ba|le|ri)_(?:goo|med|bad)_\d+", stem):
        return match[1].removesuffix(f"_{folder}")
    return video_id


def choose_C(
    features: Floats, labels: Ints, groups: Sequence[str], config: FuseConfig
) -> tuple[float, dict[float, float]]:
    """The best C, of equals the smallest, and the accuracy of every C in cross-validation whose folds divide no group.

    Raises ValueError if there are fewer than two groups.
    """
    num_folds = min(config.folds, len(set(groups)))
    if num_folds < 2:
        raise ValueError("all training videos come from one source; cross-validation of the SVM needs at least two.")
    folds = list(GroupKFold(num_folds, shuffle=True, random_state=0).split(features, labels, groups))
    accuracy: dict[float, float] = {}
    fits = tqdm(total=len(config.C) * num_folds, desc="SVM", unit="fit", delay=1, disable=None)
    for C in sorted(config.C):
        num_correct = 0
        for fit, held_out in folds:
            predicted = fit_svm(features[fit], labels[fit], C).predict(features[held_out])
            num_correct += int((predicted == labels[held_out]).sum())
            fits.update()
        accuracy[C] = num_correct / len(labels)
    fits.close()
    return max(accuracy, key=lambda C: (accuracy[C], -C)), accuracy


def fit_svm(features: Floats, labels: Ints, C: float) -> LinearSVC:
    """Multi-class linear SVM of Crammer and Singer on features (V, D) with labels (V,)."""
    svm = LinearSVC(multi_class="crammer_singer", C=C, random_state=0, max_iter=10_000)
    with warnings.catch_warnings():
        # Nets that tell nothing apart, and a high C, may need more iterations: cross-validation judges what came out.
        warnings.simplefilter("ignore", ConvergenceWarning)
        return svm.fit(features, labels)


def svm_scores(
    train: Sequence[Floats], labels: Ints, groups: Sequence[str], test: Sequence[Floats], config: FuseConfig
) -> tuple[Floats, float, dict[float, float]]:
    """Fit the SVM on training videos and score test videos, whose labels it is never given.

    Args:
        train, test: per stream (V_train, K) and (V_test, K) softmax scores.
        labels, groups: of the training videos.
    Returns the decision function (V_test, K), -inf for classes without training videos; the chosen C; and the accuracy
    of every C in cross-validation.
    """
    features = svm_features(train)
    chosen, accuracy = choose_C(features, labels, groups, config)
    svm = fit_svm(features, labels, chosen)
    decision = svm.decision_function(svm_features(test))
    if decision.ndim == 1:  # of two classes it is the second one's alone
        decision = np.stack([-decision, decision], axis=1)
    scores = np.full(test[0].shape, -np.inf)
    scores[:, svm.classes_] = decision
    return scores, chosen, accuracy


# --- score files -------------------------------------------------------------------------------------------------


def find_sources(folders: Sequence[Path]) -> list[Path]:
    """Folders with test scores: each is one itself, or a run folder, which stands for its spatial and temporal ones.

    Raises FileNotFoundError if there are none in a folder, ValueError if one is asked for twice.
    """
    found: list[Path] = []
    for folder in folders:
        streams = [folder] if score_file(folder, "test").exists() else [folder / stream for stream in STREAMS]
        scored = [stream for stream in streams if score_file(stream, "test").exists()]
        if not scored:
            raise FileNotFoundError(
                f"no scores in {folder}, {', '.join(map(str, streams))}: give folders of runs, or of their streams, "
                f"that `python -m train.evaluate RUN` has scored.{nearest_path(folder)}"
            )
        found += scored
    resolved = [folder.resolve() for folder in found]
    for number, folder in enumerate(resolved):
        if folder in resolved[:number]:
            raise ValueError(f"{found[number]} is given twice; give each source once, and --weights if it counts more.")
    return found


def name_sources(folders: Sequence[Path], streams: Sequence[str]) -> list[str]:
    """Distinct names: the stream where only one source is of it, else as much of the folders' ends as tells them apart.

    A/spatial, A/temporal                -> spatial, temporal
    A/spatial, A/temporal, B/temporal    -> spatial, A/temporal, B/temporal
    """
    parts = [folder.resolve().parts for folder in folders]
    names = []
    for own, stream in zip(parts, streams, strict=True):
        rivals = [other for other, s in zip(parts, streams, strict=True) if s == stream and other != own]
        length = next(n for n in range(2, len(own) + 2) if all(other[-n:] != own[-n:] for other in rivals))
        names.append("/".join(own[-length:]) if rivals else stream)
    return names


def make_titles(names: Sequence[str], streams: Sequence[str], weights: Sequence[float]) -> dict[str, str]:
    """Method -> its name in the table: as in the paper's Table 3 if there is one source of each stream."""
    own = {
        name: TITLES[stream] + (f" ({name})" if name != stream else "")
        for name, stream in zip(names, streams, strict=True)
    }
    usual = set(names) == set(STREAMS)
    both = {
        "average": TITLES["average"] if usual else f"Averaging of {len(names)}",
        "svm": TITLES["svm"] if usual else f"SVM on {len(names)}",
    }
    if len(set(weights)) > 1:
        both["average"] += f", weights {' : '.join(f'{weight:g}' for weight in weights)}"
    return {**own, **both}


def fuse_runs(
    folders: Sequence[Path], config: FuseConfig, weights: Sequence[float] | None = None, *, svm: bool = True
) -> Results:
    """Scores of each source, and if there are several those of their average and of the SVM.

    Args:
        folders: of runs, each standing for all its streams, or of streams; any number from 1 on.
        weights: of the sources in the average, positive, in the order of the table; equal by default. The SVM has none.
        svm: whether to fit one, which takes minutes for many training videos.
    There is no SVM, and `Results.no_svm` says why, if a source lacks scores of the training videos.
    Raises FileNotFoundError if scores are missing, ValueError if they are not of the same videos.
    """
    paths = find_sources(folders)
    test = [read_scores(score_file(path, "test")) for path in paths]
    streams = [scores.stream for scores in test]
    names = name_sources(paths, streams)
    check_aligned(dict(zip(names, test, strict=True)))
    weights = [1.0] * len(paths) if weights is None else list(weights)
    if len(weights) != len(paths) or not all(0 < weight < math.inf for weight in weights):
        raise ValueError(f"weights {weights}: give one positive number for each of {', '.join(names)}.")
    scores = {name: source.scores for name, source in zip(names, test, strict=True)}
    chosen: float | None = None
    accuracy: dict[float, float] = {}
    no_svm = ""
    if len(test) > 1:
        scores["average"] = average(_values(test), weights)
        train, no_svm = _training_scores(paths, names, test) if svm else ([], "not asked for.")
        if not no_svm:
            groups = [source_group(str(video_id)) for video_id in train[0].video_ids]
            fitted = svm_scores(_values(train), train[0].labels, groups, _values(test), config)
            scores["svm"], chosen, accuracy = fitted
    first = test[0]
    return Results(
        video_ids=first.video_ids.tolist(),
        labels=first.labels,
        classes=first.classes.tolist(),
        split_list=first.split_list,
        dataset=first.dataset,
        scores=scores,
        titles=make_titles(names, streams, weights),
        sources=[Source(*of) for of in zip(names, map(str, paths), [s.checkpoint for s in test], weights, strict=True)],
        svm_C=chosen,
        svm_accuracy=accuracy,
        no_svm=no_svm,
    )


def _training_scores(paths: Sequence[Path], names: Sequence[str], test: Sequence[Scores]) -> tuple[list[Scores], str]:
    """The sources' scores of the training videos; or none, and why."""
    train = []
    for path, name, scored in zip(paths, names, test, strict=True):
        try:
            train.append(read_scores(score_file(path, "train")))
        except FileNotFoundError:
            return [], f"{name} has no training scores; evaluate with eval.num_taus_train of at least 1."
        if train[-1].checkpoint != scored.checkpoint:
            return [], f"{name} has training scores of another checkpoint than its test scores; evaluate again."
    try:
        check_aligned(dict(zip(names, train, strict=True)))
    except ValueError as error:  # the average of the test scores is as good without
        return [], str(error)
    return train, ""


def _values(sources: Sequence[Scores]) -> list[Floats]:
    return [source.scores for source in sources]


# --- the command -------------------------------------------------------------------------------------------------


def run_of(folder: Path) -> Path:
    """The run that a folder is, or belongs to: the nearest with a config.yaml. Raises ValueError if there is none."""
    for run in (folder, *folder.absolute().parents[:2]):
        if (run / "config.yaml").exists():
            return run
    what = "neither it nor the folders around it have a config.yaml."
    raise ValueError(f"{folder} belongs to no run: {what}{nearest_path(folder)}")


def default_out(folders: Sequence[Path], weights: Sequence[float] | None) -> Path:
    """Where results go: the folder itself, for which its own fusion is meant; a folder within it for any other.

    Its name ends in digits of the other folders' whole paths, since runs of many experiments have one name.
    """
    others = [
        str(folder.resolve().relative_to(run_of(folder).resolve().parent)).replace("/", "-") for folder in folders[1:]
    ]
    digits = hashlib.sha256(repr([str(folder.resolve()) for folder in folders[1:]]).encode()).hexdigest()[:8]
    name = f"-with-{'-'.join(others)}-{digits}" if others else ""
    name += f"-weights-{'-'.join(f'{weight:g}' for weight in weights)}" if weights else ""
    return folders[0] / f"fused{name}" if name else folders[0]


def main(arguments: list[str] | None = None) -> None:
    """Command line: fuse the score files of any runs and streams."""
    parser = Parser(
        prog="python -m train.fuse",
        description="Fuse scores that runs have left, by averaging and by an SVM, and print the table.",
        epilog="examples:\n"
        "  python -m train.fuse runs/ucf101\n"
        "  python -m train.fuse runs/a/spatial runs/b/temporal --weights 1 2\n\n"
        "exit code: 0 fused; 1 failed, the last line says why",
    )
    parser.add_argument("folders", type=Path, nargs="+", metavar="FOLDER", help="of a run, or of a stream in one")
    parser.add_argument(
        "--weights", type=float, nargs="+", metavar="W", help="of each source in the average (default: equal)"
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="folder for the results (default: FOLDER, or one in the first FOLDER)"
    )
    options = parser.parse_args(arguments)
    try:
        config = read_config(run_of(options.folders[0]) / "config.yaml").fuse
        out = options.out or default_out(options.folders, options.weights)
        results = fuse_runs(options.folders, config, options.weights)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {describe_error(error)}")
    print(report(results))
    wrote = write_results(results, out)
    if out == options.folders[0]:  # a run's own results
        from train.report import leave_report  # which imports this module

        wrote += leave_report(run_of(out))
    print("\nwrote:", *wrote, sep="\n  ")


if __name__ == "__main__":
    main()
