"""Print the predicted steps of the GPU check on a device, from its data sheet alone.

python -m gpu_check.predict "H100 SXM"
"""

from __future__ import annotations

import sys

from everest_ds.costs.hardware.gpus import DEVICES
from everest_ds.costs.memory import predict_memory
from gpu_check.cases import Case
from gpu_check.engine import CASES
from gpu_check.steps import GIB, predict
from gpu_check.tables import Columns, Row, number, table, text

_COLUMNS: Columns = {
    "step": text("case"),
    "ms": number("ms", 0),
    "clips/s": number("clips_per_s", 0),
    "MFU": number("mfu_pct", 0, " %"),
    "peak GiB": number("gib", 1),
}


def main() -> None:
    """Print the table of the device named on the command line."""
    name = " ".join(sys.argv[1:])
    if name not in DEVICES:
        sys.exit(f"error: unknown device: {name!r}; allowed: {', '.join(DEVICES)}")
    print(table([_row(case, name) for case in CASES], _COLUMNS))


def _row(case: Case, device: str) -> Row:
    config = case.config(tiny=False)
    step = predict(config, DEVICES[device])
    assert step is not None, f"{case.name}: the data sheet lacks the precision of the recipe"
    clips_per_s = 1e3 * case.clips / step.ms
    gib = predict_memory(config, 1).peak_bytes / GIB
    return {"case": case.name, "ms": step.ms, "clips_per_s": clips_per_s, "mfu_pct": step.mfu_pct, "gib": gib}


if __name__ == "__main__":
    main()
