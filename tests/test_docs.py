"""Every command in the documents runs, in their order, on small generated data in one folder; what they name exists.

A block marked `sh` is a list of commands, `python` a program, `yaml` a config whose first line is its file's name,
`text` nothing to run. The tables below say what stands for what. A command that is neither run nor in a table fails.
"""

import contextlib
import importlib
import io
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from flow import demo, pool
from flow.catalog import read_ucf101_lists, walk
from tests.conftest import InThisProcess, random_video
from tests.test_flow_dirs import write_fields, write_frames
from train import experiments, launch
from train.config import resolve_config, to_flat
from train.settings import Config

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

#: In the order of the story: what one makes, a later one uses.
NAMES = [
    "README.md",
    *(f"docs/{name}.md" for name in ("accuracy", "own-data", "predict", "existing-flow", "flow", "several-gpus")),
    *(f"docs/{name}.md" for name in ("several-machines", "packing-on-ray", "remote", "throughput", "scale")),
    *(f"docs/{name}.md" for name in ("troubleshooting", "reliability", "paper", "design")),
    *(path.relative_to(ROOT).as_posix() for path in sorted((ROOT / "docs" / "experiments").glob("*.md"))),
    *("CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md"),
]

# --- what stands for what ------------------------------------------------------------------------------------------

#: Commands that only make sense elsewhere, with the reason. Beginnings of commands; each must stand in a document.
ELSEWHERE = {
    "apt-get install": "changes the machine",
    "pip install": "changes the installation",
    "pip uninstall": "changes the installation",
    ". .venv/bin/activate": "changes the shell; the tests run in that environment",
    "make install": "done before a test can run",
    "python -m flow.pack --out s3://bucket/ucf101": "needs a bucket; tests/scale/test_publish.py has one",
    "python -m flow.publish packed s3://bucket/packed": "needs a bucket; tests/scale/test_publish.py has one",
    "nvidia-smi": "NVIDIA's, where there is a GPU",
    "ray start": "Ray's, on several machines",
    "python -m flow.pack --engine ray": "needs Ray: tests/scale/test_ray.py",
    "python -m pytest": "runs tests, as is done here",
    "ruff": "make check: run beside the tests",
    "mypy": "make check: run beside the tests",
    "sbatch": "Slurm's: tests/scale/test_slurm.py submits the script",
    "kubectl": "Kubernetes': tests/test_cluster.py reads the manifest",
}

#: Programs that take long even in their quick form, and the test that runs each in it. Here their options are checked.
RUN_BY = {
    "benchmarks/before_after.py": "tests/scale/test_programs.py::test_a_checkout_is_measured_against_another_one",
    "benchmarks/decode_rates.py": "tests/test_benchmarks.py::test_gpu_proof_runs_its_steps_on_the_cpu",
    "benchmarks/flow_extraction.py": "tests/test_benchmarks.py::test_gpu_proof_runs_its_steps_on_the_cpu",
    "benchmarks/footprint.py": "tests/test_benchmarks.py::test_footprint_measures_opening_and_keeping",
    "benchmarks/gpu_proof.sh": "tests/test_benchmarks.py::test_gpu_proof_runs_its_steps_on_the_cpu",
    "benchmarks/loader_throughput.py": "tests/test_benchmarks.py::test_gpu_proof_runs_its_steps_on_the_cpu",
    "benchmarks/scale_check.py": "tests/scale/test_programs.py::test_quick_costs_feed_simulation_and_prediction",
    "benchmarks/scale_costs.py": "tests/scale/test_programs.py::test_quick_costs_feed_simulation_and_prediction",
    "benchmarks/scale_model.py": "tests/scale/test_programs.py::test_a_quick_run_writes_what_is_promised",
    "benchmarks/scaling.py": "tests/test_benchmarks.py::test_gpu_proof_runs_its_steps_on_the_cpu",
    "benchmarks/train_step.py": "tests/test_benchmarks.py::test_gpu_proof_runs_its_steps_on_the_cpu",
}

#: What reads a file or counts bytes, and is run as it is.
SHELL = {"cat", "df", "du", "tail"}

#: Option -> the value that stands for any. Tests of their own start several processes (tests/test_dist.py).
VALUES = {"--gpus": "0", "--procs": "1", "--nodes": "1", "--node-rank": "0", "--max-restarts": "0"}

#: Words of the documents -> of the generated data, or what is as good and takes less time.
WORDS = {"Archery/v_Archery_g01_c01": "RedUp/v_RedUp_g01_c01", "table1b": "flow_L1", "tvl1": "dis"}

#: Settings of a run that takes a second.
TINY = {
    "data.L": 3,
    "data.crop_px": 48,
    "model.width": 0.03125,
    "spatial.steps": 2,
    "spatial.milestones": [1],
    "temporal.steps": 2,
    "temporal.milestones": [1],
    "temporal.lr": 0.001,  # fields without a meaning, enlarged, would make the loss explode
    "train.batch_size": 8,
    "train.log_every": 1,
    "eval.num_taus": 1,
    "eval.num_taus_train": 1,
    "fuse.C": [1.0],
    "fuse.folds": 2,
}
_TINY = [f"{key}={value}" for key, value in TINY.items()]

#: What is added to a program's arguments; of an option that is given twice the last counts.
ADDED = {
    "flow.demo": ["--train", "2", "--test", "1", "--frames", "12"],
    "flow.pack --videos": ["--size", "48"],
    "flow.images": ["--size", "48"],
    "train.launch": _TINY,
    "train.experiments run": ["--results", "experiments/results_full.json", "--splits", "1", "--set", *_TINY],
    "benchmarks/draw_statistics.py": ["--quick"],
    "benchmarks/accuracy.py": ["--splits", "1", "--seeds", "0", "--out", ".", *_TINY],
}


def prepare(place):
    """The data that the documents begin with: a generated set in the place of UCF-101, other tools' folders, images."""
    demo.generate(place / "UCF-101", num_train=2, num_test=1, num_frames=12)
    shutil.move(place / "UCF-101" / "splits", place / "ucfTrainTestlist")
    shutil.copy(place / "UCF-101" / "RedUp" / "v_RedUp_g01_c01.avi", place / "video.mp4")
    (place / "data" / "ucf101").mkdir(parents=True)
    (place / "data" / "ucf101" / "packed").symlink_to(place / "packed")
    rng = np.random.default_rng(0)
    for ids in read_ucf101_lists(place / "ucfTrainTestlist").splits.values():
        for video_id in ids:
            frames, fields = random_video(rng, 6, 64, 85)
            write_frames(place / "rawframes" / video_id, frames)
            write_fields([place / "rawframes" / video_id] * 2, fields)
            write_frames(place / "jpegs_256" / video_id, frames, name="frame{:06d}.jpg")
            write_fields([place / "tvl1_flow" / axis / video_id for axis in "uv"], fields, name="frame{1:06d}.jpg")
            for side in ("train", "val"):
                write_frames(place / "ILSVRC2012" / side / Path(video_id).parent, frames[:2], name=f"{side}{{:d}}.jpg")


def is_module(name):
    """Whether it is one in this checkout; what else is installed does not count."""
    return (ROOT / name.replace(".", "/")).with_suffix(".py").exists()


# --- documents -----------------------------------------------------------------------------------------------------


def blocks(text):
    """(label, content) of every fenced block."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", text, re.M | re.S)


def commands(block):
    """The words of every command of an `sh` block: without comments, lines that go on joined."""
    lines = [shlex.split(line, comments=True) for line in block.replace("\\\n", " ").splitlines()]
    return [words for words in lines if words]


def prose(text):
    """A document without its blocks."""
    return re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)


def test_commands_are_read_as_a_shell_does():
    text = "```sh\nA=1 make x  # says\n\n# only says\npython -m a \\\n  'b c'\n```\n```text\nno command\n```\n"
    (label, first), (other, _) = blocks(text)
    assert (label, other) == ("sh", "text")
    assert commands(first) == [["A=1", "make", "x"], ["python", "-m", "a", "b c"]]


def documents():
    return {name: (ROOT / name).read_text() for name in NAMES}


def test_every_document_is_told_of():
    found = {path.relative_to(ROOT).as_posix() for path in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]}
    assert found == set(NAMES)


# --- running -------------------------------------------------------------------------------------------------------


@dataclass
class Story:
    """What became of the documents: failures by document, and what of ELSEWHERE was met.

    run: what was done already, and what was wrong with it. A command that stands in two documents is run once.
    """

    place: Path
    failures: dict[str, list[str]] = field(default_factory=dict)
    elsewhere: set[str] = field(default_factory=set)
    run: dict[str, str] = field(default_factory=dict)

    def tell(self, name, text):
        self.failures[name] = []
        for label, content in blocks(text):
            if label == "sh":
                for words in commands(content):
                    self.obey(name, words)
            elif label == "python":
                self.once(name, content, lambda content=content: exec(compile(content, name, "exec"), {}))
            elif label == "yaml":
                self.once(name, content, lambda content=content: self.write_config(content))
            elif label != "text":
                self.failures[name].append(f"a block marked {label!r}: mark it sh, python, yaml or text")

    def obey(self, name, words):
        """One command, or those that a make target stands for."""
        line = shlex.join(words)
        known = next((begin for begin in ELSEWHERE if f"{line} ".startswith(f"{begin} ")), None)
        if known:
            self.elsewhere.add(known)
            self.failures[name] += [
                f"{line}: no {word}" for word in words if word[-3:] == ".py" and not (ROOT / word).exists()
            ]
        elif words[0] == "make":
            for expanded in make(words[1:]):
                self.obey(name, expanded)
        else:
            self.once(name, line, lambda: self.execute(words))

    def once(self, name, what, action):
        """Do it, unless it was done; note what fails."""
        if what not in self.run:
            self.run[what] = attempt(action)
        if self.run[what]:
            self.failures[name].append(f"{what}\n{self.run[what]}")

    def write_config(self, content):
        path = self.place / re.match(r"# (\w+\.yaml)\n", content).group(1)
        path.write_text(content)
        resolve_config(path)

    def execute(self, words):
        """One command, with the variables before it. Returns its exit status, None for 0."""
        if re.fullmatch(r"[A-Z_]+=.*", words[0]):
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv(*words[0].split("=", 1))
                return self.execute(words[1:])
        if words[0] in SHELL:
            subprocess.run(words, check=True, capture_output=True)
            return None
        program, arguments = words[0], words[1:]
        if program == "python":
            program, *arguments = arguments[1:] if arguments[0] == "-m" else arguments
        arguments = adapt(program, arguments)
        if program in RUN_BY:
            return check_options(program, arguments)
        if words[0] != "python":
            raise ValueError(f"{words[0]} is in no table of tests/test_docs.py: say what runs it, or why nothing does")
        module = program if words[1] == "-m" else Path(program).stem
        return importlib.import_module(module).main(arguments)


def attempt(action):
    """What is wrong with an action: "" if it ends well and reports no error."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            status = action()
    except (Exception, SystemExit) as error:
        status = 0 if isinstance(error, SystemExit) and not error.code else repr(error)
    errors = [line for line in said.getvalue().splitlines() if line.startswith("error:")]
    return "" if status in (None, 0) and not errors else f"ends with {status}\n{said.getvalue()[-2000:]}"


def make(targets):
    """The commands of make targets, as in the environment that they install."""
    words = ["make", "-n", "--no-print-directory", "-o", ".venv/installed", *targets]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return commands(done.stdout.replace(".venv/bin/", ""))


def adapt(program, arguments):
    """A program's arguments on the generated data."""
    adapted = [WORDS.get(word, word) for word in arguments]
    if program not in RUN_BY:
        for option, value in VALUES.items():
            for at in (at for at, word in enumerate(adapted) if word == option):
                adapted[at + 1] = value
    for begin, added in ADDED.items():
        if f"{program} {' '.join(arguments)} ".startswith(f"{begin} "):
            adapted += added
    return adapted


def check_options(program, arguments):
    """Raise AssertionError unless the program knows its options, and a test of that name is there and runs it."""
    file, test = RUN_BY[program].split("::")
    text = (ROOT / file).read_text()
    assert f"def {test}(" in text and Path(program).stem in text + (ROOT / "benchmarks" / "gpu_proof.sh").read_text()
    unknown = {word for word in arguments if word.startswith("--")} - options_of([ROOT / program, *SHARED])
    assert not unknown, f"{program} does not know {unknown}"


#: Where options are that several benchmarks have.
SHARED = [ROOT / "benchmarks" / file for file in ("common.py", "trainee.py")]


def options_of(paths):
    """Long options that programs declare."""
    text = "".join(path.read_text() for path in paths)
    declared = re.findall(r"add_argument\(\s*\"(--[\w-]+)\"", text)
    return {*declared, *re.findall(r"^ +(--[\w-]+)\) ", text, re.M), "--help"}


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    """All documents, told."""
    place = tmp_path_factory.mktemp("story")
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setattr(os, "sched_getaffinity", lambda _: {0})  # nets this small lose by threads, on a busy machine most
        patch.setattr(pool, "_Pool", InThisProcess)
        patch.setattr(experiments, "RESULTS", place / "experiments")
        patch.setattr(experiments, "train", lambda arguments, *_: launch.main(arguments))
        accuracy, readme = (importlib.import_module(name) for name in ("accuracy", "readme"))
        patch.setattr(accuracy, "subprocess", SimpleNamespace(run=lambda command, check: launch.main(command[3:])))
        patch.setattr(readme, "ROOT", place)
        told = Story(place)
        prepare(place)
        for name, text in documents().items():  # what `benchmarks/readme.py` writes to
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            (place / name).write_text(text)
        for name, text in documents().items():
            told.tell(name, text)
    for number, handler in handlers.items():
        signal.signal(number, handler)
    return told


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_command_runs(story, name):
    assert not story.failures[name], "\n\n".join(story.failures[name])


def test_commands_that_are_run_elsewhere_stand_in_a_document(story):
    assert story.elsewhere == set(ELSEWHERE)
    told = "\n".join([*story.run, *documents().values()])
    assert {program for program in RUN_BY if program in told} == set(RUN_BY)


def test_the_documents_tables_are_left_as_they_were(story):
    for name, text in documents().items():
        assert (story.place / name).read_text() == text


def test_make_test_runs_all_tests_and_make_check_all_checks():
    """In the environment of continuous integration, which runs these two; here they are not run again."""
    assert make(["test"]) == [["python", "-m", "pytest", "-q", "-n", "2", "--dist", "loadfile"]]
    assert make(["check"]) == [["ruff", "check", "."], ["ruff", "format", "--check", "."], ["mypy"]]
    assert {"make test", "make check"} <= set((ROOT / ".ci" / "run").read_text().splitlines())


# --- what the documents name ---------------------------------------------------------------------------------------


def anchors(text):
    """The anchors that GitHub gives to a document's headings."""
    slugs, found = [], re.findall(r"^#+ (.*)$", prose(text), re.M)
    for heading in found:
        heading = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        slugs.append(slug + (f"-{slugs.count(slug)}" if slug in slugs else ""))
    return set(slugs)


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name):
    text = prose((ROOT / name).read_text())
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not re.match(r"https?:", target):
            path, _, anchor = target.partition("#")
            file = (ROOT / name).parent / path if path else ROOT / name
            assert file.exists(), f"{name} links to {target}"
            assert not anchor or anchor in anchors(file.read_text()), f"{name}: {target} has no such heading"


def spans(name):
    """What stands between backticks in a document's prose."""
    return re.findall(r"`([^`\n]+)`", prose((ROOT / name).read_text()))


SOURCES = [
    path for folder in ("flow", "loaders", "train", "benchmarks", "tests") for path in (ROOT / folder).rglob("*.*")
]


SETTING = r"((?:data|model|spatial|temporal|train|eval|fuse|flow|loaders|nets)\.\w+)(=\S*)?"


@pytest.mark.parametrize("name", NAMES)
def test_options_and_settings_exist(name):
    keys, options = to_flat(Config()), options_of(path for path in SOURCES if path.suffix in (".py", ".sh"))
    for span in spans(name):
        assert set(re.findall(r"(?<![\w-])--[a-zA-Z][\w-]*", span)) <= options, f"{name}: {span}"
        for dotted, value in re.findall(rf"^{SETTING}$", span):
            assert dotted in keys or is_module(dotted), f"{name}: {span} is no setting and no module"
            if value:
                value = "=1" if value == "=k" else value
                assert resolve_config("ucf101", ["spatial.init=CHECKPOINT", dotted + value]), f"{name}: {span}"


FILE = r"[\w./-]+\.(?:py|md|ya?ml|jsonl?|sh|txt|cff|html|npz|pt|pt2|tar|bin|safetensors)"


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_files_exist(story, name):
    """In the checkout, or in what the documents' commands have written, or a program has a name for it."""
    there = [f"{folder}/{file}" for top in (ROOT, story.place) for folder, files in walk(top) for file in files]
    sources = "".join(path.read_text() for path in SOURCES if path.suffix == ".py" and path.name != Path(__file__).name)
    for file in re.findall(rf"`({FILE})(?:::\w+)?`", prose((ROOT / name).read_text())):
        known = any(path.endswith(f"/{file}") for path in there) or f'"{Path(file).name}"' in sources
        assert known, f"{name} names {file}"


def test_the_license_is_said_alike():
    assert "Apache License\n                           Version 2.0," in (ROOT / "LICENSE").read_text()
    assert 'license="Apache-2.0"' in (ROOT / "setup.py").read_text()
    citation = (ROOT / "CITATION.cff").read_text()
    assert "\nlicense: Apache-2.0\n" in citation and "](LICENSE)" in (ROOT / "README.md").read_text()
    version = re.search(r'version="(.*)"', (ROOT / "setup.py").read_text())[1]
    assert f"\nversion: {version}\n" in citation and f": {version}\n" in (ROOT / "CHANGELOG.md").read_text()
