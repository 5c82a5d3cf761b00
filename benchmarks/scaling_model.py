"""From what scaling.py's launches measured to its tables, and to a model of how training scales. No clock runs here."""

import math
from dataclasses import dataclass, replace
from itertools import product
from statistics import median
from typing import Any

from trainee import spread

#: Devices of a projection.
PROJECTED = (1, 2, 4, 8, 16, 32, 64)

#: Bytes of a gradient on its way, by train.gradient_compression.
BYTES = {"none": 4, "bfloat16": 2}

#: Ways of sending gradients, the first being the default.
SENDING: list[dict[str, Any]] = [
    {"bucket_mb": 25.0, "gradient_compression": "none"},
    {"bucket_mb": 4.0, "gradient_compression": "none"},
    {"bucket_mb": 1000.0, "gradient_compression": "none"},
    {"bucket_mb": 25.0, "gradient_compression": "bfloat16"},
]


# --- the model ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What a step is made of, on one of n equal devices.

    step_s: samples on the device -> seconds of a step on resident data, alone.
    hidden_s: samples -> those of them in which gradients can travel unnoticed: from the moment when full6's are there,
        five sixths of all, to the end of the backward pass.
    gradient_bytes: what the devices have to sum.
    link_bytes_per_s: what a device sends, and receives at the same time.
    in_turn: the device is a core that also loads and sends, so that all times add up and none is hidden.
    """

    step_s: dict[int, float]
    hidden_s: dict[int, float]
    gradient_bytes: float
    link_bytes_per_s: float
    in_turn: bool = False


def predict(n: int, num_samples: int, parts: Parts, *, loader_samples_per_s: float = math.inf) -> dict[str, float]:
    """Seconds of a step of n devices with `num_samples` on each: {"step_s", "communication_s", "loader_s"}.

        side by side   | forward | backward: full6 ... conv1 | exposed communication | update |
                       |              the loader, at the next batch           |
        in turn        | forward | backward | communication | update | the loader, at the next batch |

    A ring all-reduce sends 2 (n - 1) / n times the gradients over every link; communication_s is the part of it that
    nothing hides. loader_samples_per_s: of one device's loader, infinite for resident data.
    Raises ValueError if no step was measured with `num_samples`.
    """
    if num_samples not in parts.step_s:
        raise ValueError(f"num_samples={num_samples}: steps were measured with {sorted(parts.step_s)}; measure it too.")
    sent_s = 2 * (n - 1) / n * parts.gradient_bytes / parts.link_bytes_per_s
    exposed_s = sent_s if parts.in_turn else max(0.0, sent_s - parts.hidden_s[num_samples])
    computed_s, loader_s = parts.step_s[num_samples] + exposed_s, num_samples / loader_samples_per_s
    step_s = computed_s + loader_s if parts.in_turn else max(computed_s, loader_s)
    return {"step_s": step_s, "communication_s": exposed_s, "loader_s": loader_s}


def project(parts: Parts, batch_size: int, loader_samples_per_s: float) -> list[dict[str, Any]]:
    """Strong scaling to 64 devices, as far as the batch divides: never measured, and labelled so in every row."""
    rows = []
    for data, compression in product(("resident", "loader"), BYTES):
        sent = replace(parts, gradient_bytes=parts.gradient_bytes * BYTES[compression] / BYTES["none"])
        rate = math.inf if data == "resident" else loader_samples_per_s
        for n in (n for n in PROJECTED if batch_size % n == 0):
            step = predict(n, batch_size // n, sent, loader_samples_per_s=rate)
            alone_s = predict(1, batch_size, sent, loader_samples_per_s=rate)["step_s"]
            row = {"label": "projection", "data": data, "gradient_compression": compression, "n": n}
            rows.append({**row, **step, "speedup": alone_s / step["step_s"]})
    return rows


def assemble(launches: list[dict[str, Any]], link_bytes_per_s: float, in_turn: bool) -> Parts:
    """The model's parts from the launches on one device."""
    measured: dict[str, dict[int, float]] = {}
    for key in ("step_s", "hidden_s"):
        rows = zip(*(one["parts"] for one in launches), strict=True)  # the rounds of each size
        measured[key] = {same[0]["num_samples"]: median(part[key] for part in same) for same in rows}
    num_bytes = launches[0]["num_parameters"] * BYTES["none"]
    return Parts(**measured, gradient_bytes=num_bytes, link_bytes_per_s=link_bytes_per_s, in_turn=in_turn)


def model_errors(
    rows: list[dict[str, Any]], parts: Parts, links: dict[int, float], loaders: dict[int, float]
) -> list[dict[str, Any]]:
    """The model against every measured row but those that it was made from.

    links, loaders: n -> bytes/s that a link was measured to carry; samples/s of one process's loader.
    """
    errors = []
    for row in rows:
        n, resident = row["n"], row["data"] == "resident"
        if n == 1 and (resident or row["mode"] == "weak"):
            continue
        local = replace(parts, link_bytes_per_s=links.get(n, math.inf))
        rate = math.inf if resident else loaders[n]
        predicted = predict(n, row["batch_size"] // n, local, loader_samples_per_s=rate)["step_s"]
        measured = row["step_s"]["median"]
        error = {key: row[key] for key in ("mode", "data", "n")}
        error |= {"predicted_step_s": predicted, "measured_step_s": measured}
        errors.append({**error, "error_pct": 100 * (predicted / measured - 1)})
    return errors


# --- tables ------------------------------------------------------------------------------------------------------


def scaling_rows(found: dict[int, list[dict[str, Any]]], batch_size: int) -> list[dict[str, Any]]:
    """A row for each scaling, kind of data and n; at n = 1 both scalings are the same measurement."""
    rows = []
    for mode, data in product(("strong", "weak"), ("resident", "loader")):
        alone = 0.0
        for n, launches in found.items():
            size = batch_size * (n if mode == "weak" else 1)
            turns = [t for one in launches for t in one["steps"] if (t["batch_size"], t["data"]) == (size, data)]
            row = {"mode": mode, "data": data, "n": n, "batch_size": size, **columns(turns)}
            alone = alone or row["samples_per_s"]["median"]
            rows.append({**row, "speedup": row["samples_per_s"]["median"] / alone})
    return rows


def columns(turns: list[dict[str, Any]]) -> dict[str, Any]:
    """Time, rate and waiting over the rounds."""
    row: dict[str, Any] = {key: spread([turn[key] for turn in turns]) for key in ("step_s", "samples_per_s")}
    return {**row, "data_wait_pct": median(turn["data_wait_pct"] for turn in turns)}


def sending_rows(launches: list[dict[str, Any]], n: int) -> list[dict[str, Any]]:
    """Each way of sending gradients, strong scaling on resident data, against the first."""
    rows = []
    for i, sending in enumerate(SENDING):
        turns = [one["sending"][i] for one in launches]
        rate = median(turn["samples_per_s"] for turn in turns)
        default = median(one["sending"][0]["samples_per_s"] for one in launches)
        rows.append({"n": n, **sending, **columns(turns), "ratio_to_default": rate / default})
    return rows


def communication_rows(launches: list[dict[str, Any]], n: int) -> list[dict[str, Any]]:
    """The all-reduce alone: bytes, time, and what a link carried."""
    rows = []
    for compression, width in BYTES.items():
        times, num_bytes = [one["all_reduce_s"][compression] for one in launches], launches[0]["num_parameters"] * width
        link = 2 * (n - 1) / n * num_bytes / median(times)
        row = {"n": n, "gradient_compression": compression, "bytes": num_bytes, "all_reduce_s": spread(times)}
        rows.append({**row, "link_gbytes_per_s": link / 1e9})
    return rows
