"""Configs: defaults, overlays, overrides, and errors that name the key."""

import pytest

from train.config import (
    CONFIG_FOLDER,
    differing_keys,
    from_flat,
    read_config,
    resolve_config,
    short_hash,
    to_flat,
    write_config,
)
from train.settings import CHANGEABLE, Config

CONFIGS = sorted(path.stem for path in CONFIG_FOLDER.glob("*.yaml"))


def overlay(tmp_path, text):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    return path


def test_defaults_are_the_papers():
    config = Config()
    for stream in (config.spatial, config.temporal):
        assert (stream.dropout, stream.lr, stream.milestones, stream.steps) == (0.9, 1e-2, [50_000, 70_000], 80_000)
    assert (config.train.batch_size, config.train.momentum, config.train.weight_decay) == (256, 0.9, 5e-4)
    assert (config.data.L, config.data.crop_px, config.eval.num_taus, config.model.width) == (10, 224, 25, 1.0)


@pytest.mark.parametrize("name", CONFIGS)
def test_shipped_configs_resolve_and_are_documented(name):
    resolve_config(name)
    lines = (CONFIG_FOLDER / f"{name}.yaml").read_text().splitlines()
    assert len(lines) <= 30
    header = "\n".join(line for line in lines if line.startswith("#"))
    for word in ("Reproduces:", "Hardware:", "Time:", "Number:", "Command:"):
        assert word in header


def test_every_paper_scale_config_is_the_paper():
    paper = to_flat(Config()) | {"data.root": None}
    for name in ("ucf101", "hmdb51"):
        assert to_flat(resolve_config(name)) | {"data.root": None} == paper


def test_overrides_beat_the_file_and_the_file_beats_the_defaults(tmp_path):
    path = overlay(tmp_path, "train:\n  seed: 4\n  batch_size: 32\ntemporal:\n  lr: 1e-3\n")
    config = resolve_config(path, ["train.seed=9", "train.streams=[temporal]", "data.root=128", "fuse.C=[1, 2.5]"])
    assert (config.train.seed, config.train.batch_size, config.train.momentum) == (9, 32, 0.9)
    assert config.train.streams == ["temporal"]
    assert config.temporal.lr == 1e-3  # YAML 1.1 reads this as a string
    assert config.data.root == "128"
    assert config.fuse.C == [1.0, 2.5]


def test_stored_config_is_the_config(tmp_path):
    config = resolve_config("demo", ["data.num_threads=3", "spatial.milestones=[]"])
    write_config(config, tmp_path / "config.yaml")
    assert read_config(tmp_path / "config.yaml") == config
    assert from_flat(to_flat(config)) == config


def test_differences_are_named_and_change_the_hash():
    a, b = resolve_config("demo"), resolve_config("demo", ["train.seed=5", "temporal.milestones=[7]"])
    assert differing_keys(a, a) == []
    assert [line.split(":")[0] for line in differing_keys(a, b)] == ["temporal.milestones", "train.seed"]
    assert "asked 5" in differing_keys(a, b)[1]
    assert short_hash(a) == short_hash(resolve_config("demo")) != short_hash(b)


def test_how_a_run_is_made_is_no_difference():
    a = resolve_config("demo")
    b = resolve_config("demo", ["train.timeout_s=9", "data.on_damage=skip", "train.log_every=3"])
    assert differing_keys(a, b) == [] and short_hash(a, CHANGEABLE) == short_hash(b, CHANGEABLE) != short_hash(a)
    assert set(to_flat(a)) >= CHANGEABLE
    c = resolve_config("demo", ["train.timeout_s=9", "train.clip_grad_norm=1"])
    assert len(differing_keys(a, c)) == 1 and short_hash(a, CHANGEABLE) != short_hash(c, CHANGEABLE)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.sed=1", "unknown config key 'train.sed'. Did you mean 'train.seed'"),
        ("dropout=1", "unknown config key 'dropout'. Did you mean 'spatial.dropout' or 'temporal.dropout'"),
        ("train=1", "unknown config key 'train'. A key is section.name, such as train.streams"),
        ("steps=3", "unknown config key 'steps'. Did you mean 'spatial.steps' or 'temporal.steps'"),
        ("train.steps=3", "unknown config key 'train.steps'. Did you mean 'spatial.steps' or 'temporal.steps'"),
        ("stepss=3", "unknown config key 'stepss'. Did you mean 'spatial.steps' or 'temporal.steps'"),
        ("Temporl.step=3", "unknown config key 'Temporl.step'. Did you mean 'temporal.steps'"),
        ("zzz=3", "unknown config key 'zzz'. A key is section.name; sections are data, model, spatial, temporal"),
        ("train.seed", "'train.seed' is not of the form key=value. Example: temporal.steps=300"),
        ("ucf101", "'ucf101' is not of the form key=value. A config is named by --config ucf101"),
        ("train.seed=abc", "train.seed='abc' is of type str; expected int"),
        ("train.seed=1.5", "train.seed=1.5 is of type float; expected int"),
        ("train.seed=true", "train.seed=True is of type bool; expected int"),
        ("train.compile=1", "train.compile=1 is of type int; expected bool"),
        ("temporal.lr=fast", "temporal.lr='fast' is of type str; expected float"),
        ("temporal.lr=true", "temporal.lr=True is of type bool; expected float"),
        ("temporal.milestones=5", r"temporal.milestones=5 is of type int; expected list\[int\]"),
        ("temporal.milestones=[7, x]", "temporal.milestones='x' is of type str; expected int"),
        ("data.loader=torch", "data.loader='torch' must be one of dali, reference"),
        ("train.streams=[spatail]", "train.streams='spatail' must be one of spatial, temporal. Did you mean 'spatial'"),
        ("train.streams=[spatial, spatial]", "train.streams=.* each once"),
        ("data.size=34.5", "data.size='34.5': auto, the stored size, or the smaller side"),
        ("temporal.dropout=1", "dropout=1.0 is not a ratio"),
        ("temporal.milestones=[9, 5]", "milestones=.* in rising order"),
        ("temporal.lr=0", "lr=0.0 must be positive"),
        ("train.batch_size=0", "train.batch_size=0 must be at least 1"),
        ("eval.num_taus=-1", "eval.num_taus=-1 must be at least 0"),
        ("fuse.C=[0]", r"fuse.C=\[0.0\] must be positive"),
        ("fuse.folds=1", "fuse.folds=1 must be at least 2"),
        ("model.width=0", "model.width=0.0 must be positive"),
        ("data.root=[", "override 'data.root=\\[' is not YAML"),
    ],
)
def test_bad_overrides_are_named(override, message):
    with pytest.raises(ValueError, match=message):
        resolve_config("demo", [override])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("trian:\n  seed: 1\n", "unknown config key 'trian.seed'. Did you mean 'train.seed'"),
        ("- 1\n", "must hold sections"),
        ("a: [\n", "mine.yaml is not YAML"),
    ],
)
def test_bad_files_are_named(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        resolve_config(overlay(tmp_path, text))


def test_unknown_configs_are_named():
    with pytest.raises(ValueError, match="unknown config 'dmo'; known: .*hmdb51, .*ucf101_mini.* Did you mean 'demo'"):
        resolve_config("dmo")
    with pytest.raises(ValueError, match="config file 'none.yaml' does not exist"):
        resolve_config("none.yaml")


def test_an_empty_overlay_is_the_defaults(tmp_path):
    assert resolve_config(overlay(tmp_path, "# nothing\ntrain:\n")) == Config()
