"""The table of `benchmarks.gpu`, from the records of its pieces."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from aig.checkpoint import TEST
from aig.runs import read_json, read_records
from convnet_aig import GATE_MODES


def markdown(names: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    """A table; "-" for what is not known."""
    if not rows:
        return ["", "Nothing yet.", ""]

    def cell(value: object) -> str:
        if isinstance(value, float):
            return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
        return "-" if value is None else str(value)

    return ["", *(f"| {' | '.join(map(cell, row))} |" for row in (names, ["---"] * len(names), *rows)), ""]


def of_steps(done: dict[str, dict]) -> list[str]:
    """A row for each net and way. The baseline is the original's way in float32."""
    names = ("net", "way", "images/s", "without gates", "gates cost", "x the original", "peak MiB", "without gates",
             "kernels a step", "launches")
    rows, baseline = [], {}
    for name, record in done.items():
        (_, net, way), found = name.split("_"), record["result"]
        gated, plain, original = found["steps"].values()
        speed, plain_speed, of_original = (
            found["batch_size"] / statistics.median(each["seconds"]) for each in (gated, plain, original))
        if way == "float32":
            baseline[net] = of_original
            counts = (original["peak_mib"], None, original["kernels"], original["launches"])
            rows.append((net, "the original's", of_original, None, None, 1, *counts))
        faster = speed / baseline[net] if net in baseline else None
        counts = (gated["peak_mib"], plain["peak_mib"], gated["kernels"], gated["launches"])
        rows.append((net, way, speed, plain_speed, f"{100 * gated['over_plain'][1] - 100:.1f} %", faster, *counts))
    return markdown(names, rows)


def of_inference(done: dict[str, dict]) -> list[str]:
    keys = ("net", "batch", "contender", "median_s", "images_per_second", "mac_fraction", "time_fraction",
            "times_torchvision")
    return markdown(keys, [[row[key] for key in keys] for record in done.values() for row in record["result"]["rows"]])


def of_trainings(names: Sequence[str], out: Path) -> list[str]:
    """How far each training is, and what its best model gave in each gate mode: top-1 and execution rate."""
    rows = []
    for name in names:
        records, tests = read_records(out / "runs" / name), read_json(out / "runs" / name / TEST)
        if records:
            by_mode = map(tests.get, GATE_MODES)
            given = [each and f"{each['top1']:.2f} % at {each['execution_rate']:.2f}" for each in by_mode]
            seconds, last = statistics.median(each["seconds"] for each in records), records[-1]
            rows.append((name, last["epoch"], float(seconds), f"{last['val']['top1']:.2f} %", *given))
    return markdown(("training", "epochs", "s an epoch", "last epoch", *GATE_MODES), rows)


def table(names: Sequence[str], out: Path) -> str:
    """Everything that is known so far of the pieces of these names, in Markdown."""
    known = {name: read_json(out / f"{name}.json") for name in names}
    done = {name: record for name, record in known.items() if record.get("status") == 0}
    failed = {name: record["last_lines"] for name, record in known.items() if record.get("status")}
    steps, inference, tests = ({name: done[name] for name in done if name.startswith(kind)}
                               for kind in ("step_", "inference_", "tests_"))
    devices = sorted({record["result"]["device"] for record in (*steps.values(), *inference.values())})
    lines = [f"{len(done)} of {len(known)} pieces done; {'; '.join(devices)}", "", "## Training step"]
    lines += [*of_steps(steps), "## Conditional inference", *of_inference(inference), "## Trainings"]
    lines += [*of_trainings([name[6:] for name in names if name.startswith("train_")], out), "## Tests", ""]
    lines += [f"- {name}: {record['result']}" for name, record in tests.items()]
    for name, last in failed.items():
        lines += ["", f"## Failed: {name}", "", *(f"    {line}" for line in last)]
    return "\n".join(lines) + "\n"
