"""The results of the GPU check as Markdown for docs/benchmarks.md, and as one file for docs/measured.

python -m gpu_check.tables OUT [OUT ...]     prints the tables
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]
Part = dict[str, Any]
MEASURED = Path("docs/measured")
_KERNELS = 15
_PHASES = ("forward", "backward", "update")
_PARTS = ("ceilings", "engine", "released", "changes", "replay", "memory", "end_to_end", "calibration")


def main() -> None:
    """Print the tables of the result folders on the command line and write the file for docs/measured."""
    parts = read_parts([Path(folder) for folder in sys.argv[1:]])
    if not parts:
        given = f"no results in {' '.join(sys.argv[1:])}" if sys.argv[1:] else "no folder was given"
        sys.exit(f"error: {given}; allowed: folders with one of {', '.join(_PARTS)} as .json")
    print(render(parts))
    file = MEASURED / f"{_slug(next(iter(parts.values())))}.json"
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps({"format": "everest-ds gpu_check, format 1", "parts": parts}, indent=1) + "\n")
    print(f"written: {file}", file=sys.stderr)


def read_parts(folders: Sequence[Path]) -> dict[str, Part]:
    """Read the parts by name, in the order of the check; if a part is in several folders, the last counts."""
    files = [(name, folder / f"{name}.json") for name in _PARTS for folder in folders]
    return {name: json.loads(file.read_text()) for name, file in files if file.is_file()}


def render(parts: dict[str, Part]) -> str:
    """Return all tables as Markdown, each below a line with its machine and versions."""
    sections = [render_part(part) for part in parts.values()]
    return "\n\n".join(section for section in sections if section) + "\n"


def render_part(part: Part) -> str:
    """Return a part as Markdown: heading, environment, tables, and cases that failed or were left out."""
    rows = part["rows"]
    measured = [row for row in rows if "error" not in row and "left_out" not in row]
    lines = [f"### {_TITLES[part['part']]}", _where(part), *_TABLES[part["part"]](measured)]
    lines += [f"- {row['case']}: **{row['error']}**" for row in rows if "error" in row]
    lines += [f"- {row['case']}: not measured, {row['left_out']}" for row in rows if "left_out" in row]
    return "\n\n".join(line for line in lines if line)


def _where(part: Part) -> str:
    about = part["environment"]
    packages = about["packages"]
    facts = [about["device"], "bf16", f"torch {about['torch']}", f"DeepSpeed {packages['deepspeed']}"]
    facts += [f"Python {about['python']}", f"commit {(about['commit'] or 'unknown')[:12]}", about["time"]]
    rehearsal = "**A rehearsal with tiny models: no figure below means anything.** " if part["tiny"] else ""
    state = _state(part.get("state_after") or part["state_before"])
    return f"{rehearsal}Measured on {', '.join(facts)}{state}."


def _state(csv: str | None) -> str:
    """Return the figures of the first GPU in nvidia-smi's CSV, with their names."""
    if not csv:
        return ""
    names, values = (line.split(", ") for line in csv.splitlines()[:2])
    return "; " + ", ".join(f"{n.split(' [')[0]} {v}" for n, v in zip(names, values, strict=True))


# --- One function per kind of table ------------------------------------------------------------------------


def _step_tables(rows: Sequence[Row]) -> list[str]:
    steps = [row for row in rows if "step_ms" in row and "profile" not in row]
    prefetched = [row for row in rows if "beside_ms" in row]
    kernels = [_kernels(row) for row in rows if "profile" in row]
    return [table(steps, _STEP_COLUMNS), table(prefetched, _PREFETCH), *kernels]


def _kernels(row: Row) -> str:
    profile = row["profile"]
    total = profile["device_busy_ms"] or profile["step_ms"]
    listed = profile["kernels"] or profile["operators"]
    lead = (
        f"Kernels of {row['case']}: {profile['launches']:.0f} launches per step, the device busy for"
        f" {profile['device_busy_ms']:.1f} of {profile['step_ms']:.1f} ms."
    )
    columns: Columns = {
        "kernel": lambda r: f"`{r['name'][:90]}`",
        "calls": number("calls", 0),
        "ms": number("ms", 2),
        "share": lambda r: f"{100 * r['ms'] / total:.1f} %",
    }
    return f"{lead}\n\n{table(listed[:_KERNELS], columns)}"


def _ceiling_tables(rows: Sequence[Row]) -> list[str]:
    limits = {name: value for row in rows if row["case"] in ("device", "host") for name, value in row.items()}
    limits.pop("case", None)
    products = [
        {"case": row["case"], "map": name, **rates}
        for row in rows
        for name, rates in row.items()
        if row["case"].startswith("products") and isinstance(rates, dict)
    ]
    attention = [row for row in rows if row["case"].startswith("attention")]
    backends = ("chosen", "flash", "cudnn", "efficient")
    columns: Columns = {"attention": text("case"), "torch chooses": text("torch_chooses")}
    columns |= {f"{name}, both passes": number(f"{name}_both_ms", 3, " ms") for name in backends}
    return [
        table([{"name": name.replace("_", " "), "value": value} for name, value in limits.items()], _LIMITS),
        table(products, _PRODUCTS),
        table(attention, columns),
    ]


def _released_tables(rows: Sequence[Row]) -> list[str]:
    contenders = [row for row in rows if "contender" in row]
    ratios = [{"case": row["case"], **ratio} for row in rows for ratio in row.get("ratios", [])]
    return [table(contenders, _CONTENDERS), table(ratios, _RATIOS)]


def _generic_tables(rows: Sequence[Row]) -> list[str]:
    flat = [
        {"case": row["case"], "figure": name.replace("_", " "), "value": value}
        for row in rows
        for name, value in row.items()
        if name != "case"
    ]
    return [table(flat, {"case": text("case"), "figure": text("figure"), "value": number("value", 2)})]


Column = Callable[[Row], str]
Columns = dict[str, Column]


def table(rows: Sequence[Row], columns: Columns) -> str:
    """Return a Markdown table, or an empty string if there are no rows."""
    if not rows:
        return ""
    lines: list[Iterable[str]] = [columns, ["---"] * len(columns)]
    lines += [[column(row) for column in columns.values()] for row in rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "/") for cell in line) + " |" for line in lines)


def text(key: str) -> Column:
    """Return a column of text, with a dash for a row that has none."""
    return lambda row: str(row.get(key, "-"))


def number(key: str, digits: int, unit: str = "") -> Column:
    """Return a column of numbers with `digits` decimal digits."""

    def cell(row: Row) -> str:
        value = row.get(key)
        if value is None:
            return "-"
        return f"{value:.{digits}f}{unit}" if isinstance(value, float) else f"{value}{unit}"

    return cell


def _phases(key: str) -> Column:
    def cell(row: Row) -> str:
        found = row.get(key)
        return " / ".join(f"{found[name]:.1f}" for name in _PHASES) if found else "-"

    return cell


def _gib(key: str) -> Column:
    return lambda row: "-" if row.get(key) is None else f"{row[key] / 2**30:.2f}"


_STEP_COLUMNS: Columns = {
    "step": text("case"),
    "ms": number("step_ms", 1),
    "predicted ms": number("predicted_ms", 1),
    "clips/s": number("clips_per_s", 0),
    "MFU": number("mfu_pct", 1, " %"),
    "host ms (forward / backward / update)": _phases("host_ms"),
    "device ms": _phases("device_ms"),
    "peak GiB": number("peak_gib", 2),
    "predicted GiB": number("predicted_gib", 2),
    "memory error": number("memory_error_pct", 1, " %"),
    "first step s": number("first_step_s", 1),
}
_PREFETCH: Columns = {
    "step": text("case"),
    "in line, ms": number("in_line_ms", 1),
    "overlapped, ms": number("beside_ms", 1),
}
_REPLAYS: Columns = {
    "passes": text("case"),
    "launched, ms": number("launched_ms", 1),
    "replayed, ms": number("replayed_ms", 1),
    "memory of the graph, GiB": number("graph_gib", 2),
}
_LIMITS: Columns = {"limit": text("name"), "value": number("value", 2)}
_PRODUCTS: Columns = {
    "products": text("case"),
    "map": text("map"),
    **{f"{name}, TFLOP/s": number(name, 0) for name in ("forward", "dx", "dw")},
}
_CONTENDERS: Columns = {
    "contender": text("case"),
    "step ms": number("step_ms", 1),
    "forward": number("forward_ms", 1),
    "backward": number("backward_ms", 1),
    "optimiser": number("optimizer_ms", 1),
    "clips/s": number("clips_per_s", 0),
    "MFU": number("mfu_pct", 1, " %"),
    "passes GiB": _gib("passes_peak_bytes"),
    "states GiB": _gib("states_bytes"),
    "skipped": text("skipped_steps"),
    "failure": text("failure"),
}
_RATIOS: Columns = {
    "case": text("case"),
    "step time": text("step time"),
    "of medians": number("of_medians", 2),
    "quartiles": lambda row: f"{row['quartile_1']:.2f} to {row['quartile_3']:.2f}",
    "without optimiser": number("without_optimizer", 2),
}
_TITLES = {
    "ceilings": "Limits of the device",
    "engine": "The engine's step",
    "released": "Comparison with the released systems",
    "changes": "Gain of each change",
    "replay": "Waiting for the host",
    "memory": "Memory, predicted and measured",
    "end_to_end": "Training from video files",
    "calibration": "Calibration",
}
_TABLES: dict[str, Callable[[Sequence[Row]], list[str]]] = {
    "ceilings": _ceiling_tables,
    "engine": _step_tables,
    "released": _released_tables,
    "changes": _step_tables,
    "replay": lambda rows: [table(rows, _REPLAYS)],
    "memory": _step_tables,
    "end_to_end": _generic_tables,
    "calibration": _generic_tables,
}


def _slug(part: Part) -> str:
    """Return a file name such as `gpu_check-nvidia-h100-80gb-hbm3-1a2b3c4d`, with `tiny-` for a rehearsal."""
    about = part["environment"]
    name = f"gpu_check-{about['device']}-{(about['commit'] or 'unknown')[:8]}"
    return ("tiny-" if part["tiny"] else "") + re.sub(r"[^a-z0-9_]+", "-", name.lower()).strip("-")


if __name__ == "__main__":
    main()
