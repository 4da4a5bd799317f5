"""Devices described by a user's YAML or JSON file, for hardware that is not in the built-in table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from everest_ds.costs.hardware.gpus import DEVICES, Device, find_product
from everest_ds.costs.hardware.links import LINKS
from everest_ds.errors import UsageError, nearest

_EXAMPLE = (
    "memory_gib: 64, tflops: {fp32: 40, bf16: 300}, memory_gb_per_s: 2000, link: pcie5, host_link: pcie5,"
    " watts: 500"
)
_OPTIONAL = {"matmul_share": None, "source": "your file", "reported_as": "(?!)"}


def device_of(name: str) -> tuple[str, Device]:
    """Return the short name and the device for a product name or a device description file.

    Raises:
        UsageError: the name is neither a known product nor a readable device file, or the file has a key that
            is unknown, missing or out of range.
    """
    path = Path(name)
    if path.suffix in (".yaml", ".yml", ".json"):
        return path.stem, _read(path)
    product = find_product(name)
    return product, DEVICES[product]


def _read(path: Path) -> Device:
    try:
        tree = yaml.safe_load(path.read_text())  # JSON is a subset of YAML
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"{path}: not readable as YAML", given=" ".join(str(error).split())) from None
    if not isinstance(tree, dict):
        raise UsageError(f"{path}: the file does not describe a device", allowed=f"keys such as {_EXAMPLE}")
    _check_keys(tree, path)
    for key in ("memory_gib", "memory_gb_per_s", "watts", "matmul_share"):
        _check_number(tree, key, path)
    for key in ("link", "host_link"):
        if tree[key] not in LINKS:
            raise UsageError(f"{path}: {key}", given=tree[key], allowed=nearest(str(tree[key]), LINKS))
    _check_rates(tree["tflops"], path)
    return Device(**{**_OPTIONAL, **tree})


def _check_keys(tree: Mapping[str, Any], path: Path) -> None:
    known = [field.name for field in fields(Device)]
    for key in tree:
        if key not in known:
            raise UsageError(f"{path}: unknown key `{key}`", allowed=nearest(str(key), known))
    missing = [key for key in known if key not in tree and key not in _OPTIONAL]
    if missing:
        raise UsageError(f"{path}: missing keys: {', '.join(missing)}", fix=f"for example {_EXAMPLE}")


def _check_rates(rates: object, path: Path) -> None:
    dtypes = ("fp32", "tf32", "fp16", "bf16")
    if not isinstance(rates, dict) or not rates or not set(rates) <= set(dtypes):
        raise UsageError(f"{path}: tflops", given=rates, allowed=f"a peak rate by dtype: {', '.join(dtypes)}")
    for dtype in rates:
        _check_number(rates, dtype, path)


def _check_number(tree: Mapping[str, Any], key: str, path: Path) -> None:
    value = tree.get(key, 1)
    if not isinstance(value, int | float) or isinstance(value, bool) or value <= 0:
        raise UsageError(f"{path}: {key}", given=repr(value), allowed="a number above 0")
