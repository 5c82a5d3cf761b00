"""Whatever bytes a reader is given, it ends in success or in one of our errors: a short, derandomized cut of what
`python -m tests.fuzz` does for half an hour. And that the fuzzer itself would tell."""

import io
import json
import subprocess
import sys
import zlib
from pathlib import Path
from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flow.clips import read_clips
from flow.shard import CLIP_FRAMES, Clip, Member, write_clip
from loaders.index import open_index
from tests.fuzz import __main__ as campaign
from tests.fuzz import mutate, seeds
from tests.fuzz.judge import Finding, attempt
from tests.fuzz.targets import TARGETS, Target

ROOT = Path(__file__).parent.parent
IN_PROCESS = sorted(name for name, target in TARGETS.items() if not target.native)
NATIVE = sorted(set(TARGETS) - set(IN_PROCESS))


def few(examples):
    return settings(
        max_examples=examples,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )


@pytest.mark.parametrize("name", IN_PROCESS)
def test_sound_files_are_accepted(name):
    assert all(attempt(TARGETS[name].read, seed) for seed in TARGETS[name].seeds())


@pytest.mark.parametrize("name", IN_PROCESS)
def test_changed_files_are_read_or_refused(name):
    """Some are refused, some may be read, and nothing else happens: that would be a Finding."""
    target, rng = TARGETS[name], Random(0)
    assert False in [attempt(target.read, target.mutate(rng.choice(target.seeds()), rng)) for _ in range(60)]


@pytest.mark.parametrize("name", IN_PROCESS)
@given(data=st.binary(max_size=600))
@few(20)
def test_other_files_are_refused(name, data):
    """All but those of which nothing, or a line of anything, is one."""
    assert not attempt(TARGETS[name].read, data) or name in ("config", "log", "split_files")


def run_child(folder, names, runs):
    command = [sys.executable, "-m", "tests.fuzz.child", *names, "--runs", str(runs), "--work", str(folder)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_changed_images_and_videos_do_not_end_the_process(tmp_path):
    """In batches of 640, in which the decoder is known to crash; in a process of its own, if it does."""
    done = run_child(tmp_path, NATIVE, 20)
    assert (done.returncode, done.stdout.splitlines()[-1:]) == (0, ["{}"]), done.stderr[-2000:]


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(mutate.INTEGERS),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=8,
)


@pytest.mark.parametrize("name", ["clip_json", "dataset_json"])
@given(value=JSON_VALUES, data=st.data())
@few(60)
def test_any_json_value_is_read_or_refused(name, value, data):
    """As the whole, or in the place of any value of a sound one."""
    tree = [json.loads(TARGETS[name].seeds()[0])]
    parent, key = data.draw(st.sampled_from(list(mutate.places(tree))))
    parent[key] = value
    attempt(TARGETS[name].read, json.dumps(tree[0]).encode("utf-8", "surrogatepass"))


@st.composite
def clips(draw):
    """Clips as a video's can be: any bytes for images, fields from any frame on, any range."""
    count = draw(st.integers(1, 6))
    first = CLIP_FRAMES * draw(st.integers(0, 2))
    numbers = st.floats(width=32, allow_nan=False, allow_infinity=False)
    jpeg = st.binary(min_size=1, max_size=30)
    image = st.builds(Member, jpeg)
    ranges = st.lists(st.floats(-1e6, 1e6, width=32), min_size=2, max_size=2, unique=True).map(sorted)
    component = st.builds(lambda jpeg, lo_hi, mean: Member(jpeg, *lo_hi, mean), jpeg, ranges, numbers)
    members = {"rgb": {t: draw(image) for t in range(first, first + count)}}
    begin, end = sorted(draw(st.tuples(*[st.integers(first, first + count)] * 2)))
    for kind in draw(st.sampled_from([(), ("dx", "dy"), ("dx", "dy", "bdx", "bdy")])) if begin < end else ():
        members[kind] = {t: draw(component) for t in range(begin, end)}
    name = st.text(st.characters(codec="ascii", categories=["L", "N"]), min_size=1, max_size=120)
    side = st.integers(1, 4096)
    header = dict(class_name=draw(name), class_id=draw(st.none() | st.integers(0, 1000)), is_last=draw(st.booleans()))
    header |= dict(first_frame=first, num_frames=count, height=draw(side), width=draw(side))
    return Clip(video_id=f"ü/{draw(name)}", **header, members=members)


@given(clip=clips())
@few(60)
def test_a_clip_that_is_written_is_what_is_read(tmp_path, clip):
    buffer = io.BytesIO()
    write_clip(buffer, clip)
    path = tmp_path / "shard-000000.tar"
    path.write_bytes(buffer.getvalue() + bytes(1024))
    (found,) = read_clips(path)
    for key in ("video_id", "class_name", "class_id", "first_frame", "num_frames", "is_last", "height", "width"):
        assert getattr(found, key) == getattr(clip, key)
    assert set(found.entries) == set(clip.members)
    for kind, (first, entries) in found.entries.items():
        for frame, entry in enumerate(entries, first):
            member = clip.members[kind][frame]
            assert path.read_bytes()[int(entry["offset"]) :][: int(entry["size"])] == member.jpeg
            assert entry["crc32"] == zlib.crc32(member.jpeg)
            if kind != "rgb":
                assert (entry["lo"], entry["hi"], entry["mean"]) == (member.lo, member.hi, member.mean)


# --- the fuzzer tells --------------------------------------------------------------------------------------------


def raises(error):
    def read(data):
        raise error

    return read


def decodes(data):
    data.decode()


def loses(data):
    assert data == b"kept"


@pytest.mark.parametrize(
    "read, kind",
    [
        (raises(KeyError("x")), "KeyError"),
        (raises(MemoryError()), "MemoryError"),
        (raises(ValueError("not of the program")), "ValueError"),
        (decodes, "UnicodeDecodeError"),
        (loses, "AssertionError"),
    ],
)
def test_another_error_is_a_finding(read, kind):
    with pytest.raises(Finding, match=kind):
        attempt(read, b"\xff")


def test_an_error_of_ours_is_none(tmp_path):
    """Unless its message would write to the terminal what it quotes: here the name of the folder."""
    for name in ("set", "\x1b[31m"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "dataset.json").write_bytes(b"{")
    assert not attempt(lambda data: open_index(tmp_path / "set"), b"")
    with pytest.raises(Finding, match="ShardError"):
        attempt(lambda data: open_index(tmp_path / "\x1b[31m"), b"")


def test_a_child_that_dies_is_counted(tmp_path, monkeypatch):
    """Killed, ended early, or hung, with its numbers as far as it told them."""
    (tmp_path / "crashers").mkdir()
    ends = {
        "import os; print('#12\\tNEW'); print('#31\\tNEW', flush=True); os.kill(os.getpid(), 11)": ("crash", 31),
        "print('ERROR: libFuzzer: timeout after 30 seconds'); raise SystemExit(70)": ("timeout", 0),
        "print('ERROR: libFuzzer: out-of-memory (used: 9Mb)'); raise SystemExit(71)": ("out-of-memory", 0),
        "pass": ("crash", 0),
        "print('#7\\tDONE   cov: 5 ft: 6\\nstat::number_of_executed_units: 7\\nstat::peak_rss_mb:  90')": ("done", 7),
    }
    turns = []
    for code, expected in ends.items():
        monkeypatch.setattr(campaign, "CHILD", ["-c", code])
        turns.append(campaign.take_turn("log", tmp_path, 1, seed=len(turns)))
        assert (turns[-1]["ended"], turns[-1]["runs"]) == expected
    counts = campaign.summary(turns, found=[])
    assert (counts["runs"], counts["crashes"], counts["timeouts"], counts["out_of_memory"]) == (38, 2, 1, 1)
    assert (counts["peak_rss_mb"], counts["edges"]) == (90, 5)
    assert sorted(path.name for path in (tmp_path / "crashers").iterdir()) == [f"log-{n}.log" for n in range(4)]


def test_findings_are_kept_once_with_their_input(tmp_path, monkeypatch):
    from tests.fuzz import child

    monkeypatch.setitem(TARGETS, "x", Target("x", decodes, seeds.logs, lambda data, rng: data + b"\xff"))
    for _ in range(2):
        turn = child.Turn("x", tmp_path)
        child.run_mutations(turn, 5, seed=1)
        assert list(turn.found.values()) == [5]
    (found,) = campaign.findings(tmp_path)
    assert "UnicodeDecodeError" in found["traceback"]
    assert (tmp_path / "crashers" / found["input"]).read_bytes() == seeds.logs()[0] + b"\xff"


@pytest.mark.parametrize("name", sorted(TARGETS))
def test_mutations_follow_the_seed(name):
    target = TARGETS[name]
    data = target.seeds()[0]
    changed = [target.mutate(data, Random(number)) for number in range(40)]
    assert changed == [target.mutate(data, Random(number)) for number in range(40)]
    assert sum(other != data for other in changed) > 20
