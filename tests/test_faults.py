"""Every case of tests/faults in its short form, and the program that counts them."""

import json

import numpy as np
import pytest

from tests.faults import Fault
from tests.faults import __main__ as program

ALL = dict(program.CASES)


@pytest.mark.parametrize("name", ALL)
def test_short_case(name, tmp_path):
    faults = list(ALL[name](np.random.default_rng(0), tmp_path, True))
    assert faults and [fault for fault in faults if not fault.survived or fault.lost] == []


def sound(rng, folder, short):
    assert not list(folder.iterdir())
    yield Fault(f"number {rng.integers(1 << 30)}")


def broken(rng, folder, short):
    yield Fault("first")
    raise RuntimeError("no such file")


def lossy(rng, folder, short):
    yield Fault("last", lost=2)


def idle(rng, folder, short):
    yield from ()


@pytest.mark.parametrize(
    ("cases", "last_line", "code"),
    [
        ({"sound": sound}, "faults injected: 1, survived: 1, data lost: 0", 0),
        ({"sound": sound, "broken": broken}, "faults injected: 3, survived: 2, data lost: 0", 1),
        ({"lossy": lossy, "sound": sound}, "faults injected: 2, survived: 2, data lost: 2", 1),
        ({"idle": idle}, "faults injected: 1, survived: 0, data lost: 0", 1),
    ],
)
def test_the_last_line_counts_and_the_exit_code_judges(cases, last_line, code, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(program, "CASES", cases)
    out = tmp_path / "faults.json"
    outputs = []
    for _ in range(2):
        assert program.main(["--seed", "7", "--out", str(out)]) == code
        outputs.append(capsys.readouterr().out)
    faults = [[line for line in output.splitlines() if line.startswith("  ")] for output in outputs]
    assert faults[0] == faults[1], "a seed draws the same again"
    assert outputs[0].splitlines()[-1] == last_line and all(f"{name} (seed 7)" in outputs[0] for name in cases)
    result = json.loads(out.read_text())
    assert f"faults injected: {result['injected']}, survived: {result['survived']}" in last_line
    assert [row["name"] for row in result["rows"]] == list(cases) and result["complete"] is True


def test_an_unknown_case_is_refused(capsys):
    with pytest.raises(SystemExit, match="2"):
        program.main(["no such"])
    assert "no such case: no such" in capsys.readouterr().err
