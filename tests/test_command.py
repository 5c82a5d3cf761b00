"""Commands: help that tells all, wrong words that meet the right ones, progress that is quiet without a terminal."""

import argparse
import ast
import difflib
import importlib
import os
import re
import shutil
import string
import subprocess
import sys
import termios
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flow import command, images, pack, verify
from flow.command import Parser, describe_error, did_you_mean, nearest_path, say
from train import evaluate, experiments, figures, fuse, launch
from train.config import config_names, to_flat
from train.settings import Config

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import accuracy  # noqa: E402
import flow_extraction  # noqa: E402
import loader_throughput  # noqa: E402

KEYS = sorted(to_flat(Config()))
#: Every program that people start, and nothing that a program starts for itself.
COMMANDS = [
    path.relative_to(ROOT)
    for folder in ("flow", "train", "benchmarks", "tests/faults", "tests/fuzz")
    for path in sorted((ROOT / folder).glob("*.py"))
    if '__name__ == "__main__"' in path.read_text() and path.name != "child.py"
]


def load(path):
    name = path.stem if path.parts[0] == "benchmarks" else ".".join(path.with_suffix("").parts)
    return importlib.import_module(name)


def parsers_in(parser):
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            assert action.choices.keys() == {choice.dest for choice in action._choices_actions}, "without help"
            for inner in action.choices.values():
                yield from parsers_in(inner)


@pytest.mark.parametrize("path", COMMANDS, ids=str)
def test_help_tells_what_a_command_does_and_every_option(path, monkeypatch, capsys):
    printed = []
    monkeypatch.setattr(Parser, "print_help", lambda self, file=None: printed.append(self))
    with pytest.raises(SystemExit, match="0"):
        load(path).main(["--help"])
    assert len(printed) == 1, f"{path} does not use flow.command.Parser"
    for parser in parsers_in(printed[0]):
        assert isinstance(parser, Parser) and parser.description, parser.prog
        text = " ".join(parser.format_help().split())
        for action in parser._actions:
            if action.help != argparse.SUPPRESS and not isinstance(action, argparse._SubParsersAction):
                assert action.help, f"{parser.prog}: {action.option_strings or action.dest} has no help"
                assert all(option in text for option in action.option_strings)
                assert action.nargs == 0 or action.choices or action.metavar, f"{path}: {action.dest} of what?"
    for name, words in re.findall(r"^ +python -m ([\w.]+)(.*)", printed[0].epilog or "", re.M):
        check_example(name, words.split(), printed[0])


def check_example(name, words, parser):
    """An example in the help names a command of ours, and options that it has."""
    assert Path(*name.split(".")).with_suffix(".py") in COMMANDS
    if f"python -m {name}" == parser.prog:
        parse = parser.parse_intermixed_args if name == "train.launch" else parser.parse_args
        if "--help" not in words:
            parse(words)


def test_what_is_a_command_is_found():
    assert {"flow/pack.py", "train/launch.py", "benchmarks/charts.py", "tests/faults/__main__.py"} <= set(
        map(str, COMMANDS)
    )


# --- wrong words -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "main, words, message",
    [
        (
            pack.main,
            ["--video", "v", "--out", "o"],
            "is required. There is no option --video. Did you mean '--videos'?",
        ),
        (pack.main, ["--videos", "v", "--ot=o"], "are required: --out. There is no option --ot. Did you mean '--out'?"),
        (pack.main, ["--videos=v", "--out=o", "--wrkers=2"], "arguments: --wrkers=2. Did you mean '--workers'?"),
        (pack.main, ["--videos=v", "--out=o", "-seed", "2"], "arguments: -seed 2. Did you mean '--seed'?"),
        (pack.main, ["--videos=v", "--out=o", "--q", "2"], "arguments: --q 2. Did you mean '--quality'?"),
        (pack.main, ["--videos=v", "--out=o", "--zzz"], "unrecognized arguments: --zzz\n"),
        (pack.main, ["--videos=v", "--out=o", "--method", "Brx"], "'nvof'). Did you mean 'brox'?"),
        (pack.main, ["--videos=v", "--out=o", "--size", "-5", "--method", "zzz"], "'nvof')\n"),
        (
            images.main,
            ["--tain", "t", "--out", "o"],
            "required: --train. There is no option --tain. Did you mean '--train'",
        ),
        (verify.main, ["packed", "--depe"], "unrecognized arguments: --depe. Did you mean '--deep'?"),
        (launch.main, ["a.b=1", "--gpu", "1"], "arguments: --gpu 1. Did you mean '--gpus'?"),
        (launch.main, ["--temporal.steps=3"], "a setting is given without dashes: temporal.steps=3"),
        (evaluate.main, ["run", "--forc"], "arguments: --forc. Did you mean '--force'?"),
        (fuse.main, ["run", "--weihgts", "1"], "Did you mean '--weights'?"),
        (figures.main, ["flwo", "packed", "a/1"], "'recall'). Did you mean 'flow'?"),
        (
            figures.main,
            ["flow", "packed", "a/1", "--tua", "2"],
            "figures flow: error: unrecognized arguments: --tua 2\n",
        ),
        (figures.main, ["stacking", "packed", "a/1", "--tua", "2"], "arguments: --tua 2. Did you mean '--tau'?"),
        (figures.main, ["filters", "run", "--stream", "spacial"], "Did you mean 'spatial'?"),
        (experiments.main, ["reprot"], "Did you mean 'report'?"),
        (experiments.main, ["run", "all", "--seed", "1"], "arguments: --seed 1. Did you mean '--seeds'?"),
        (experiments.main, ["run", "all", "--scale", "ful"], "Did you mean 'full'?"),
    ],
)
def test_a_wrong_option_or_choice_meets_the_right_one(main, words, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(words)
    assert message in capsys.readouterr().err


def test_words_after_two_dashes_and_numbers_are_no_options(capsys):
    parser = Parser()
    parser.add_argument("--number", type=float)
    parser.add_argument("names", nargs="*")
    assert parser.parse_args(["--number", "-1.5", "--", "--numbr"]).names == ["--numbr"]
    with pytest.raises(SystemExit, match="2"):
        parser.parse_args(["--number", "-x", "--", "--nmber"])
    assert "There is no option -x" in (text := capsys.readouterr().err) and "nmber" not in text.partition("error")[2]


def test_a_wrong_experiment_meets_the_right_one(capsys):
    with pytest.raises(SystemExit, match="nothing is called 'tabel1a'; .* Did you mean 'table1a'"):
        experiments.main(["run", "tabel1a"])


WORDS = st.text(string.ascii_letters + string.digits + "-_./é ", min_size=2, max_size=30)
few = settings(max_examples=60, derandomize=True, database=None, deadline=None)


def proposed(text):
    return re.fullmatch(r" Did you mean (['\"])(.*)\1\?", text)[2]


@given(known=st.lists(WORDS, min_size=1, max_size=30), data=st.data())
@few
def test_a_word_that_lacks_a_letter_is_found_again(known, data):
    """Or another that is as near to what was typed."""
    word = data.draw(st.sampled_from(known))
    place = data.draw(st.integers(0, len(word) - 1))
    typed = word[:place] + word[place + 1 :]

    def alike(name):
        return difflib.SequenceMatcher(None, name.lower(), typed.lower()).ratio()

    found = proposed(did_you_mean(typed, known))
    assert found in known and max(
        alike(found), difflib.SequenceMatcher(None, typed.lower(), found.lower()).ratio()
    ) >= (min(alike(word), difflib.SequenceMatcher(None, typed.lower(), word.lower()).ratio()))
    assert proposed(did_you_mean(typed.upper(), [word])) == word


@pytest.mark.parametrize("known", [KEYS, config_names()], ids=["keys", "configs"])
def test_every_key_and_config_survives_every_dropped_letter(known):
    for word in known:
        for place in range(len(word)):
            typed = word[:place] + word[place + 1 :]
            found = typed if typed in known else proposed(did_you_mean(typed, known))  # flow_L10 without 0 is flow_L1
            assert difflib.SequenceMatcher(None, found, word).ratio() >= 0.8


@given(known=st.lists(st.text("abcdef", min_size=1), max_size=20), word=st.text("uvwxyz", max_size=300))
@few
def test_nothing_is_proposed_for_nonsense(known, word):
    assert did_you_mean(word, known) == ""


def test_of_endless_words_the_first_are_compared():
    endless = iter(lambda: "word", None)
    assert did_you_mean("wrod", endless) == " Did you mean 'word'?"


# --- wrong paths -----------------------------------------------------------------------------------------------------


NAMES = st.text(string.ascii_letters + string.digits + "-_é ", min_size=3, max_size=12).filter(lambda n: n == n.strip())


@given(names=st.lists(NAMES, min_size=1, max_size=3), data=st.data())
@few
def test_a_path_that_lacks_letters_is_found_again(tmp_path_factory, names, data):
    root = tmp_path_factory.getbasetemp() / "paths"
    shutil.rmtree(root, ignore_errors=True)
    path = root.joinpath(*names)
    path.mkdir(parents=True)
    assert nearest_path(path) == ""
    wrong = root
    for name in names:
        place = data.draw(st.integers(0, len(name)))  # len: nothing is dropped
        wrong /= name[:place] + name[place + 1 :]
    assert nearest_path(wrong) == ("" if wrong == path else f" Did you mean {str(path)!r}?")


def test_a_path_that_is_like_none_says_how_far_it_leads(tmp_path, monkeypatch):
    (tmp_path / "data" / "UCF-101").mkdir(parents=True)
    (tmp_path / "data" / "file").touch()
    monkeypatch.chdir(tmp_path)
    assert nearest_path("data/zzz/packed") == " 'data' is there, 'zzz' is not in it."
    assert nearest_path("dta/ucf101/packed") == " Did you mean 'data/UCF-101'?"
    assert nearest_path("data/file/packed") == " 'data/file' is no folder."
    assert nearest_path("zzz") == ""
    for strange in ("a\0b", "x" * 5000, "data/" + "y" * 300):  # what no file system has
        assert "Did you mean" not in nearest_path(strange)


def test_an_error_of_a_file_names_it_and_the_nearest(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("names.txt").touch()

    def error_of(name):
        with pytest.raises(OSError, match="No such|Is a") as caught:
            open(name)
        return describe_error(caught.value)

    assert error_of("nmes.txt") == "nmes.txt: No such file or directory. Did you mean 'names.txt'?"
    assert error_of(".") == ".: Is a directory."
    assert describe_error(FileNotFoundError("no such run")) == "no such run"
    assert describe_error(ValueError("a\nb")) == "a\nb"


PLACES = {"RUN": "run", "PACKED": "packed", "CLIPS": "clips"}


@pytest.mark.parametrize(
    "main, words, message",
    [
        (pack.main, ["--videos", "clps", "--out", "o"], "clps is no folder. .*Did you mean 'clips'"),
        (
            pack.main,
            ["--videos", "clips", "--splits", "clips/Rnu", "--out", "o"],
            "clips/Rnu is no .* mean 'clips/Run'",
        ),
        (
            pack.main,
            ["--videos", "clips", "--splits", "split", "--dataset", "ucf101", "--out", "o"],
            "--splits split is no folder. .*Did you mean 'splits'",
        ),
        (pack.main, ["--flow-dir", "clips/Rum", "--range", "9", "--out", "o"], "Rum is no .* mean 'clips/Run'"),
        (
            pack.main,
            ["--flow-dir", "clips", "--frames-dir", "cips", "--range", "9", "--out", "o"],
            "cips is no folder. .* mean 'clips'",
        ),
        (images.main, ["--train", "clip", "--out", "o"], "clip is not there. .* mean 'clips'"),
        (images.main, ["--train", "clips", "--val", "clipps", "--out", "o"], "clipps is not there. .* mean 'clips'"),
        (
            images.main,
            ["--train", "clips", "--classes", "nmaes.txt", "--out", "o"],
            "nmaes.txt: No such file or directory. Did you mean 'names.txt'",
        ),
        (verify.main, ["pcaked"], "pcaked is no packed data set: it is not there. Did you mean 'packed'"),
        (verify.main, ["pcaked", "--rebuild-index"], "pcaked holds no shard.* Did you mean 'packed'"),
        (verify.main, ["."], "it has no dataset.json. Did you mean 'packed'"),
        (launch.main, ["data.root=pcked"], "pcked is no packed data set: it is not there. Did you mean 'packed'"),
        (launch.main, ["--config", "my.yml"], "'my.yml' does not exist. Did you mean 'my.yaml'"),
        (launch.main, ["--config", "ucf_mini"], "unknown config 'ucf_mini'; .* Did you mean 'ucf101_mini'"),
        (launch.main, ["INIT=run/temporl/x.pt"], "init=run/temporl/x.pt: no such .* Did you mean 'run/temporal'"),
        (evaluate.main, ["rnu"], "rnu is no run folder: no config.yaml. Did you mean 'run'"),
        (evaluate.main, ["run/temporal"], "run/temporal is no run folder: no config.yaml. Did you mean 'run'"),
        (evaluate.main, ["."], "no config.yaml. Did you mean 'run'"),
        (evaluate.main, ["packed"], "packed is no run folder: .*Give a run folder of `python -m train.launch`"),
        (fuse.main, ["rnu"], "rnu belongs to no run: .* Did you mean 'run'"),
        (fuse.main, ["run/temporal", "run/tmporal"], "no scores in run/t.*"),
        (figures.main, ["filters", "rnu"], "no checkpoint at .* Did you mean 'run/temporal'"),
        (figures.main, ["recall", "rnu"], "no results at rnu: .*train.fuse.* Did you mean 'run'"),
        (figures.main, ["flow", "packd", "run/long"], "packd is no packed data set: .* Did you mean 'packed'"),
        (figures.main, ["flow", "packed", "run/lng"], "holds no video 'run/lng'. Did you mean 'run/long'"),
        (experiments.main, ["report", "--results", "reslts.json"], "reslts.json: No .* Did you mean 'results.json'"),
        (loader_throughput.main, ["--data", "pcked"], "pcked is no packed data set: .* Did you mean 'packed'"),
        (accuracy.main, ["--data", "pcked"], "pcked is no packed data set: .* Did you mean 'packed'"),
        (flow_extraction.main, ["--data", "clps"], "clps is no folder. .* Did you mean 'clips'"),
    ],
)
def test_a_wrong_path_meets_the_right_one(packed, tmp_path, monkeypatch, capsys, main, words, message):
    """In one line, and nothing is left behind."""
    monkeypatch.chdir(tmp_path)
    for folder in ("clips/Run", "splits", "run/temporal"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "packed").symlink_to(packed)
    for file in ("clips/Run/a.avi", "run/config.yaml", "my.yaml", "names.txt", "results.json"):
        (tmp_path / file).touch()
    init = ["data.root=packed", "data.L=2", "data.crop_px=48", "train.streams=[temporal]", "eval.num_taus_train=0"]
    words = [*init, words[0].replace("INIT", "temporal.init")] if words[0].startswith("INIT") else words
    before = set(os.listdir())
    try:
        assert main(words) == 2
        text = capsys.readouterr().err
    except SystemExit as error:
        text = str(error)
    assert re.search(f"^error: .*{message}", text.strip()) and len(text.strip().splitlines()) == 1, text
    assert set(os.listdir()) == before


# --- progress --------------------------------------------------------------------------------------------------------


def test_progress_is_quiet_without_a_terminal_and_shown_on_one(packed):
    run = [sys.executable, "-m", "flow.verify", str(packed), "--workers", "1"]
    piped = subprocess.run(run, cwd=ROOT, capture_output=True, text=True)
    assert piped.returncode == 0 and piped.stderr == "" and piped.stdout.count("\n") == 1
    leader, follower = os.openpty()
    termios.tcsetwinsize(follower, (24, 80))
    with subprocess.Popen(run, cwd=ROOT, stdout=subprocess.PIPE, stderr=follower) as process:
        os.close(follower)
        shown = b""
        try:
            while part := os.read(leader, 4096):
                shown += part
        except OSError:  # the other end is closed
            pass
        assert process.stdout.read().decode() == piped.stdout
    os.close(leader)
    assert b"checking: 100%" in shown and b"2/2" in shown and b"shard/s" in shown


def bars(path):
    """(line, keywords) of every progress bar in a file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "tqdm":
            yield node.lineno, {keyword.arg for keyword in node.keywords}, len(node.args)


def test_every_bar_says_what_it_counts_and_asks_for_a_terminal():
    found = [
        (path, *bar)
        for folder in ("flow", "loaders", "train", "benchmarks")
        for path in sorted((ROOT / folder).rglob("*.py"))
        for bar in bars(path)
    ]
    assert len(found) > 10
    for path, line, keywords, num_args in found:
        assert "disable" in keywords, f"{path}:{line}: without disable=None it speaks where nobody looks"
        assert "desc" in keywords or num_args > 1, f"{path}:{line}: progress of what?"


def test_say_prints_at_once(capsys):
    say("a line")
    assert capsys.readouterr().out == "a line\n"


def test_words_are_wrapped_for_a_terminal():
    lines = command.wrap_words(KEYS).splitlines()
    assert all(line.startswith("  ") and len(line) <= 80 for line in lines) and len(lines) > 5
    assert " ".join(lines).split() == " ".join(f"{key}," for key in KEYS).rstrip(",").split()
