"""The packed data sets of the experiments: how they are made, and whether they are there and fit together."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from flow.command import nearest_path
from flow.untrusted import read_json
from train.plan import MINI_SIZE_PX, Run, Setting, locate, run_config, stream_of

#: Data set of the configs -> how it is packed.
PACKING = {
    "ucf101": "python -m flow.pack --videos UCF-101 --splits ucfTrainTestlist --dataset ucf101 --backward",
    "hmdb51": "python -m flow.pack --videos HMDB51 --splits testTrainMulti_7030_splits --dataset hmdb51 --backward",
    "imagenet": "python -m flow.images --train ILSVRC2012/train --val ILSVRC2012/val",
    "ucf101_mini": "python -m flow.pack --videos CLIPS --splits ucfTrainTestlist --dataset ucf101 "
    f"--size {MINI_SIZE_PX} --backward, where CLIPS is a selection of UCF-101",
    "jhmdb_mini": "python -m flow.pack --videos CLIPS --splits testTrainMulti_7030_splits --dataset hmdb51 "
    f"--size {MINI_SIZE_PX} --backward, where CLIPS is a selection of J-HMDB",
    "imagenet_mini": f"python -m flow.images --train CLIPS --size {MINI_SIZE_PX} --every 3, where CLIPS is a folder "
    "of clips of other classes, never of those that are tested on",
}


def check_data(runs: Iterable[Run], setting: Setting) -> None:
    """Raise ValueError if a packed data set that the runs need is not there, or shows the classes of a test too soon.

    What replaces ImageNet at mini scale is of classes that the other sets lack, or pre-training would see test clips.
    """
    roots: dict[str, None] = {}
    for run in runs:
        config = run_config(run.config, setting)
        roots.update(dict.fromkeys([config.data.root, *config.stream(stream_of(config)).extra_roots]))
    classes: dict[str, set[str]] = {}
    for root in roots:
        path = locate(root, setting)
        name = Path(root).parts[-2] if len(Path(root).parts) > 1 else root
        if not (path / "dataset.json").exists():
            how = f" with --out {path}: {PACKING[name]}" if name in PACKING else " with flow.pack"
            what = f"Pack it{how}; or name the folder of all sets by --data."
            raise ValueError(f"{path} is no packed data set. {what}{nearest_path(setting.data)}")
        try:
            classes[name] = {row["name"] for row in read_json(path / "dataset.json")["classes"]}
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path / 'dataset.json'} is damaged: {error!r:.200}. Pack the set again.") from None
    for name, others in classes.items():
        if name != "imagenet_mini" and (both := others & classes.get("imagenet_mini", set())):
            raise ValueError(
                f"imagenet_mini and {name} both have the class {min(both)!r}: nets would be pre-trained on what they "
                "are tested on. Pack imagenet_mini of clips of other classes."
            )
