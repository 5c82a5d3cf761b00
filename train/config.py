"""What a run is: typed defaults (the paper's), a YAML overlay on them, and `key=value` overrides on that.

    train/settings.py  <-  train/configs/NAME.yaml  <-  data.root=P128 temporal.steps=300

Only this module reads or writes YAML. A run folder keeps the resolved config, so that a run can be named by its folder.
"""

from __future__ import annotations

import dataclasses
import hashlib
import types
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from flow.command import did_you_mean, folders_with, nearest, nearest_path
from flow.shard import write_bytes
from flow.untrusted import read_bounded
from train.settings import CHANGEABLE, Config, require

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
        require(path.is_file(), f"config file {str(path)!r} does not exist.{near or nearest_path(path)}")
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
    require(isinstance(content, dict), f"{path} must hold sections such as `train:` with keys, not {content!r:.200}.")
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
        require(len(value) <= _MAX_LIST, f"{key} has {len(value)} values; expected at most {_MAX_LIST}.")
        for item in value:
            _bounded(key, item)
    elif isinstance(value, str):
        require(len(value) <= _MAX_TEXT, f"{key} has {len(value)} characters; expected at most {_MAX_TEXT}.")
    elif value is not None:
        largest = _LARGEST.get(key, 1 << 31)
        require(abs(value) <= largest, f"{key}={value}: expected a number of at most {largest}.")  # NaN is none
    return value
