"""The map of the house holds: who may import whom, which third-party package stays behind which door, and which test
covers which line of SECURITY.md."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = {"flow": set(), "loaders": {"flow"}, "nets": set(), "train": {"flow", "loaders", "nets"}}
DOORS = {
    "cv2": {"flow/"},
    "nvidia": {"loaders/pipeline.py", "flow/nvof.py"},
    "yaml": {"train/config.py"},
    "torch.distributed": {"train/dist.py"},
    "av": {"flow/render.py"},
    "PIL": {"flow/render.py"},
    "safetensors": {"train/export.py"},
    "fsspec": {"flow/store.py"},
    "aiohttp": {"flow/store.py"},
    "ray": {"flow/ray_engine.py", "flow/ray_node.py"},
}


def imports(path):
    """Dotted names that a file imports anywhere, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


PACKAGES["benchmarks"] = set(PACKAGES)
for free in ("cv2", "nvidia"):  # peers and ceilings are measured against them
    DOORS[free].add("benchmarks/")

FILES = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_respect_the_borders(path):
    name = path.relative_to(ROOT).as_posix()
    package = name.split("/")[0]
    for module in imports(path):
        top = module.split(".")[0]
        assert top not in set(PACKAGES) - PACKAGES[package] - {package}, f"{name} imports {module}"
        for door, allowed in DOORS.items():
            if module == door or module.startswith(door + "."):
                assert any(name.startswith(place) for place in allowed), f"{name} imports {module}"


@pytest.mark.parametrize("package", ["flow", "loaders", "nets", "train"])
def test_importing_a_package_loads_nothing_heavy(package):
    heavy = "{'torch', 'cv2', 'nvidia.dali', 'sklearn', 'yaml', 'numpy'}"
    code = f"import sys, {package}; print(*sorted({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == ""


def test_flow_works_without_torch():
    """Every module of flow but those of the two methods that need more than OpenCV."""
    modules = [
        path.stem for path in sorted((ROOT / "flow").glob("*.py")) if path.stem not in ("__init__", "brox", "nvof")
    ]
    names = ", ".join(f"flow.{module}" for module in modules)
    code = f"import sys, {names}; print(*{{'torch', 'nvidia.dali'}} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == ""


def test_security_md_names_every_test_of_strangers_files_and_none_that_is_not():
    named = set(re.findall(r"`(tests/\w+\.py)::(test_\w+)`", (ROOT / "SECURITY.md").read_text()))
    assert len(named) > 20
    for file, test in named:
        assert f"def {test}(" in (ROOT / file).read_text(), f"{file} has no {test}"
    for path in (ROOT / "tests").glob("test_hostile_*.py"):
        file = path.relative_to(ROOT).as_posix()
        tests = {(file, test) for test in re.findall(r"^def (test_\w+)\(", path.read_text(), re.M)}
        assert tests and tests <= named, f"SECURITY.md does not name {tests - named}"
