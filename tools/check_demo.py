"""Check for CI that the figures of `make demo` keep the promises of the README."""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main() -> None:
    """Read summary.json, print each promise with its result, and exit 1 if a promise is broken."""
    summary = json.loads(Path(sys.argv[1]).read_text())
    pretrain, finetune = summary["pretrain"], summary["finetune"]
    promises = {
        "the pre-training loss falls": pretrain["loss_last"] < pretrain["loss_first"],
        "top-1 is at least twice chance": finetune["top1"] >= 2 * finetune["chance"],
        "pre-training beats training from scratch by 10 points": finetune["top1"]
        >= finetune["top1_from_scratch"] + 10,
    }
    for promise, holds in promises.items():
        print(f"{'ok' if holds else 'BROKEN'}: {promise}")
    if not all(promises.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
