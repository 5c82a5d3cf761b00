"""flow.ray_engine without Ray: what is refused, what a node does, how often it is tried. The rest: tests/scale."""

import dataclasses
import sys
import tempfile
from types import SimpleNamespace

import pytest

from flow import images, pack, ray_engine, ray_node
from flow.codec import Codec
from flow.fragment import FragmentTask, Recipe, write_fragment
from flow.ray_engine import RayEngine
from flow.video import write_video
from tests.test_video import moving_frames

EXCEPTIONS = ("WorkerCrashedError", "OutOfMemoryError", "NodeDiedError", "ObjectLostError", "RaySystemError")


class RayError(Exception):
    pass


class RayTaskError(RayError):
    ip = "10.0.0.7"

    def __init__(self, cause):
        super().__init__("a traceback")
        self.cause = cause


class FakeRay:
    """In the place of the module: tasks run in this process when they are asked for.

    deaths: name of a task's fragment -> what happens to its attempts, in turn; what is not named is done.
    """

    def __init__(self, **deaths):
        self.exceptions = SimpleNamespace(**{name: type(name, (RayError,), {}) for name in EXCEPTIONS})
        self.exceptions.RayError, self.exceptions.RayTaskError = RayError, RayTaskError
        self.deaths = {name: list(kinds) for name, kinds in deaths.items()}
        self.util = SimpleNamespace(get_node_ip_address=lambda: "10.0.0.7")
        self.attempts, self.joined, self.num_gpus, self.num_silent = [], 0, 0.0, 0

    def init(self, **_):
        self.joined += 1

    def shutdown(self):
        self.joined -= 1

    def is_initialized(self):
        return self.joined > 0

    def cluster_resources(self):
        return {"CPU": 2.0, "GPU": self.num_gpus}

    def available_resources(self):
        return {"GPU": self.num_gpus}

    def get_runtime_context(self):
        return SimpleNamespace(get_node_id=lambda: "0123456789")

    def remote(self, **_):
        return lambda function: SimpleNamespace(options=lambda **_: SimpleNamespace(remote=self._submit(function)))

    @staticmethod
    def _submit(function):
        return lambda *arguments: _Ref(function, arguments)

    def wait(self, refs, num_returns=1, timeout=None):
        if self.num_silent and timeout:
            self.num_silent -= 1
            return [], refs
        return refs[:num_returns], refs[num_returns:]

    def get(self, ref):
        job, task = ref.arguments
        self.attempts.append((task.fragment.name, job.alone))
        if self.deaths.get(task.fragment.name):
            death = self.deaths[task.fragment.name].pop(0)
            raise getattr(self.exceptions, death) if isinstance(death, str) else death
        try:
            return ref.function(job, task)
        except Exception as error:
            raise RayTaskError(error) from None


@dataclasses.dataclass(eq=False)
class _Ref:
    function: object
    arguments: tuple


@pytest.fixture
def ray(monkeypatch):
    def install(**deaths):
        fake = FakeRay(**deaths)
        monkeypatch.setitem(sys.modules, "ray", fake)
        monkeypatch.setattr(ray_engine, "_NODE_DEATH_S", 0.0)
        return fake

    return install


@pytest.fixture
def tasks(tmp_path):
    (tmp_path / "videos").mkdir()
    (tmp_path / "run").mkdir()
    recipe = Recipe(size_px=48, method="dis", codec=Codec())
    made = []
    for name in ("a", "b", "c"):
        video = tmp_path / "videos" / f"{name}.avi"
        write_video(video, moving_frames(4, seed=ord(name)))
        made.append(FragmentTask(video, f"Run/{name}", "Run", None, tmp_path / "run" / name, recipe))
    return made


def fragments(tasks):
    return [task.fragment.read_bytes() for task in tasks if task.fragment.exists()]


def packed(tasks):
    """The fragments as they are without an engine."""
    for task in tasks:
        write_fragment(task)
    content = fragments(tasks)
    for task in tasks:
        task.fragment.unlink()
    return content


@pytest.mark.parametrize(
    "command", [(pack, "--videos"), (pack, "--range", "20", "--flow-dir"), (images, "--train")], ids=str
)
def test_without_ray_and_of_addresses_of_no_use(tmp_path, monkeypatch, capsys, ray, command):
    module, *options = command
    write_video(tmp_path / "clip.avi", moving_frames(3))
    for folder in ("A/clip.avi", "A/clip"):
        (tmp_path / "in" / folder).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / "clip.avi").rename(tmp_path / "in/A/clip.avi")
    if "--flow-dir" in options:
        (tmp_path / "in/A/clip").mkdir()
        for name in ("img_00001.jpg", "flow_x_00001.jpg", "flow_y_00001.jpg"):
            (tmp_path / "in/A/clip" / name).write_bytes(b"")
    given = [*options, str(tmp_path / "in"), "--out", str(tmp_path / "out")]
    monkeypatch.setitem(sys.modules, "ray", None)
    assert module.main([*given, "--engine", "ray"]) == 2
    assert "pip install 'two-stream[ray]'" in capsys.readouterr().err
    ray()
    assert module.main([*given, "--engine", "ray", "--ray-address", "ray://head:10001"]) == 2
    assert "expected HOST:PORT, or auto" in capsys.readouterr().err
    assert module.main([*given, "--ray-address", "head:6379"]) == 2
    assert "ray_address='head:6379' is for the engine ray" in capsys.readouterr().err
    assert not (tmp_path / "out" / "dataset.json").exists()


@pytest.mark.parametrize("seen", [True, False])
def test_fragments_are_the_same_whether_a_node_sees_their_folder_or_not(tasks, ray, monkeypatch, seen):
    expected = packed(tasks)
    fake = ray()
    if not seen:
        monkeypatch.setattr(ray_engine._Token, "in_folder", lambda self, folder: "another")
    with RayEngine("dis", None, None, None) as engine:
        reports = dict((task.video_id, report) for task, report in engine.run(write_fragment, tasks))
    assert fragments(tasks) == expected and fake.joined == 0
    assert all(report.totals.num_videos == 1 and not report.bad for report in reports.values()) and len(reports) == 3


def test_a_death_costs_another_attempt_and_only_the_culprit_is_lost(tasks, ray):
    expected = packed(tasks)
    fake = ray(
        a=["WorkerCrashedError"] * 2 + ["OutOfMemoryError"], b=["NodeDiedError"] * 4, c=["WorkerCrashedError"] * 2
    )
    with RayEngine("dis", None, None, None) as engine:
        results = {task.video_id: report for task, report in engine.run(write_fragment, tasks)}
    assert results["Run/a"] is None and results["Run/b"].totals.num_videos == results["Run/c"].totals.num_videos == 1
    assert fragments(tasks) == expected[1:]
    counts = {name: [alone for at, alone in fake.attempts if at == name] for name in "abc"}
    assert counts == {"a": [False, False, True], "b": [False] * 5, "c": [False, False, True]}
    alone = [alone for _, alone in fake.attempts]
    assert alone == sorted(alone), "suspects are tried alone before all else is done"


def test_a_video_that_no_node_survives_is_lost_in_the_end(tasks, ray):
    fake = ray(a=["NodeDiedError"] * 99)
    with RayEngine("dis", None, None, None) as engine:
        results = {task.video_id: report for task, report in engine.run(write_fragment, tasks)}
    assert results["Run/a"] is None and results["Run/b"] and results["Run/c"]
    assert len([name for name, _ in fake.attempts if name == "a"]) == 2 * ray_engine._NODE_DEATHS


def test_a_node_that_differs_is_named(tasks, ray, monkeypatch):
    fake = ray()
    identity = ray_node.node_identity
    calls = []

    def other(method, compare_field):
        calls.append(method)
        found = identity(method, compare_field=compare_field)
        return {**found, "opencv": "4.0.0"} if len(calls) > 1 else found

    monkeypatch.setattr(ray_node, "node_identity", other)
    with pytest.raises(
        ValueError, match=r"Node .*10\.0\.0\.7, 01234567\) would pack other bytes: opencv 4\.0\.0, and not"
    ):
        list(RayEngine("dis", None, None, None).run(write_fragment, tasks))
    assert fake.joined == 0


@pytest.mark.parametrize(("there", "message"), [(None, "does not see"), (7, "sees 7 bytes, and not")])
def test_a_node_that_sees_other_videos_is_named(tasks, ray, monkeypatch, there, message):
    ray()
    work = ray_node.work
    monkeypatch.setattr(ray_node, "work", lambda *given: dataclasses.replace(work(*given), sizes=[there]))
    with pytest.raises(ValueError, match=f"{message}.*a.avi.*same path"):
        list(RayEngine("dis", None, None, None).run(write_fragment, tasks))


def test_a_video_that_is_gone_everywhere_is_bad_as_ever(tasks, ray):
    tasks[0].path.unlink()
    ray()
    with RayEngine("dis", None, None, None) as engine:
        results = {task.video_id: report for task, report in engine.run(write_fragment, tasks)}
    assert results["Run/a"].bad.keys() == {"Run/a"} and not results["Run/b"].bad


def test_an_exception_of_a_task_is_raised_and_the_cluster_is_left(tasks, ray):
    fake = ray()
    with pytest.raises(FileNotFoundError):
        tasks[1] = dataclasses.replace(tasks[1], fragment=tasks[1].fragment.parent / "none" / "b")
        list(RayEngine("dis", None, None, None).run(write_fragment, tasks))
    assert fake.joined == 0


def test_a_method_is_proven_where_a_task_has_failed(tasks, ray, monkeypatch):
    """Another node's library would say nothing of that node's."""
    fake = ray(b=["WorkerCrashedError", "WorkerCrashedError"])
    asked = []
    affinity = SimpleNamespace(NodeAffinitySchedulingStrategy=lambda node_id, soft: (node_id, soft))
    fake.util.scheduling_strategies = affinity
    monkeypatch.setattr(
        ray_node, "run_alone", lambda function, task: (_ for _ in ()).throw(RuntimeError("device lost"))
    )
    with RayEngine("dis", None, None, None) as engine:

        def on_error(task, error):
            asked.append(str(error))
            monkeypatch.setattr(
                engine, "_proof", SimpleNamespace(options=lambda **options: asked.append(options) or Broken())
            )
            return engine.prove({})

        class Broken:
            def remote(self, *_):
                raise ValueError("no field there")

        with pytest.raises(ValueError, match="no field there"):
            list(engine.run(write_fragment, tasks, on_error))
    assert asked == ["device lost", {"scheduling_strategy": ("0123456789", False)}]
    assert fake.joined == 0


def system_error(text):
    return type("RaySystemError", (RayError,), {})(text)


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (
            RayTaskError(ModuleNotFoundError("No module named 'flow'")),
            ValueError,
            r"node 10\.0\.0\.7: No module.*Install",
        ),
        (RayTaskError(system_error("System error: No module named 'flow'\n  File")), ValueError, "10.0.0.7: No module"),
        (
            RayTaskError(RuntimeError("The remote function failed to import on the worker:\n\nNo module named 'flow'")),
            ValueError,
            "10.0.0.7: No module named 'flow'. Install two-stream on every node",
        ),
        (system_error("the disk is full\nof files"), ValueError, "on a node: RaySystemError: the disk is full. See"),
        (RayTaskError(OSError(28, "No space left")), OSError, r"No space left on node 10\.0\.0\.7"),
        (RayTaskError(KeyError("x")), KeyError, "x"),
    ],
)
def test_errors_of_ray_and_of_nodes_say_where_and_what_to_do(tasks, ray, error, kind, message):
    fake = ray(b=[error])
    with pytest.raises(kind, match=message):
        list(RayEngine("dis", None, None, None).run(write_fragment, tasks))
    assert fake.joined == 0


def test_gpus_are_of_one_kind_and_torch_is_compared_there_too(tasks, ray, monkeypatch):
    fake = ray()
    fake.num_gpus = 1.0
    identity = ray_node.node_identity("brox", compare_field=False)
    assert identity["torch"] not in ("", "none") and not any("field" in key for key in identity)
    kinds = iter(["H100", "H100", "A100"])
    monkeypatch.setattr(ray_node, "gpu_name", lambda: next(kinds))
    with pytest.raises(ValueError, match="would pack other bytes: GPU A100, and not H100"):
        list(RayEngine("brox", None, None, None).run(write_fragment, tasks))
    monkeypatch.setattr(ray_node, "gpu_name", lambda: "H100")
    torch = iter(["2.13.0", "2.13.0", "2.12.0"])
    monkeypatch.setattr(ray_node, "_version", lambda _: next(torch))
    monkeypatch.setattr(ray_node, "node_identity", ray_node.node_identity.__wrapped__)
    with pytest.raises(ValueError, match=r"other bytes: torch 2\.12\.0, and not 2\.13\.0"):
        list(RayEngine("brox", None, None, None).run(write_fragment, tasks))


def test_a_ray_that_is_in_use_is_left_alone(tasks, ray):
    fake = ray()
    engine = RayEngine("dis", None, None, None)
    fake.joined = 1
    with pytest.raises(ValueError, match="Ray is in use in this process"):
        list(engine.run(write_fragment, tasks))
    with pytest.raises(ValueError, match="Ray is in use in this process"):
        RayEngine("dis", None, None, None)
    assert fake.joined == 1


def test_a_cluster_without_room_is_told_of_once(tasks, ray, monkeypatch, caplog):
    fake = ray()
    fake.num_silent = 5
    monkeypatch.setattr(ray_engine, "_SILENCE_S", 1e-9)
    with RayEngine("dis", None, None, None) as engine:
        assert len(list(engine.run(write_fragment, tasks))) == 3
    (record,) = caplog.records
    assert "free are 0 of the cluster's 2 cores, and 0 of its 0 GPUs" in record.getMessage()


def full(task):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("seen", [True, False])
def test_a_full_disk_is_that_of_the_folder_that_was_written_to(tasks, ray, monkeypatch, seen):
    ray()
    if not seen:
        monkeypatch.setattr(ray_engine._Token, "in_folder", lambda self, folder: "another")
    with pytest.raises(OSError, match=r"No space left on device on node 10\.0\.0\.7") as error:
        list(RayEngine("dis", None, None, None).run(full, tasks))
    assert error.value.filename == (None if seen else tempfile.gettempdir()) and error.value.errno == 28
