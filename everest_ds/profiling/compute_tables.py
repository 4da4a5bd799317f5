"""Tables of a model's compute, made without running the model: to print, to save and to compare.

All figures are per clip (one view). Predicted figures come from a closed formula, counted figures from a
trace of the real model.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from everest_ds.config.schema import Experiment
from everest_ds.costs.compute import (
    FLOPS_PER_MAC,
    LITERATURE_MACS_PER_NORM_ELEMENT,
    count_parameters,
    predict_macs,
)
from everest_ds.profiling.mac_counter import (
    ComputeCount,
    count_experiment,
)

Table = list[dict[str, Any]]
_MEGA, GIGA = 1e6, 1e9


def profile_experiment(config: Experiment) -> dict[str, Table]:
    """Return tables `compute`, `by_module`, `by_operator` and `not_counted` of an experiment's model."""
    predicted, counted = predict_macs(config), count_experiment(config)
    norms = LITERATURE_MACS_PER_NORM_ELEMENT * predicted.layer_norm_elements
    formula = _figures(count_parameters(config), predicted.forward_macs, norms, predicted.training_macs)
    traced = traced_figures(counted.num_parameters, counted.forward, counted.training_step)
    for figures, macs in ((formula, predicted.literature_macs), (traced, counted.literature_macs)):
        figures["forward with every token embedded, as published: literature's GFLOPs"] = macs / GIGA
    compute = rows_beside("figure", {"predicted": formula, "counted": traced})
    return {"compute": compute, **count_details(counted.forward, counted.training_step)}


def traced_figures(num_parameters: int, forward: ComputeCount, training: ComputeCount) -> dict[str, float]:
    """Return a model's labelled figures from its counts."""
    norms = forward.literature_macs - forward.macs
    return _figures(num_parameters, forward.macs, norms, training.macs)


def _figures(num_parameters: int, forward: int, norms: int, training: int) -> dict[str, float]:
    """Return a model's labelled figures from its MACs and its LayerNorms in the literature's weighting."""
    return {
        "trainable parameters, M": num_parameters / _MEGA,
        "forward, GMACs": forward / GIGA,
        "forward, literature's GFLOPs (GMACs, plus 5 per LayerNorm element)": (forward + norms) / GIGA,
        "forward, true GFLOPs (2 per MAC)": FLOPS_PER_MAC * forward / GIGA,
        "training step, GMACs": training / GIGA,
        "training step, true GFLOPs (2 per MAC)": FLOPS_PER_MAC * training / GIGA,
    }


def count_details(forward: ComputeCount, training: ComputeCount) -> dict[str, Table]:
    """Return tables of counted compute by module and by operator, and of calls that are not counted."""
    norms = _merge_blocks(forward.layer_norm_elements_by_module)
    by_module = {
        "forward_gmacs": _giga(_merge_blocks(forward.macs_by_module)),
        "layer_norm_gmacs": _giga(
            {path: LITERATURE_MACS_PER_NORM_ELEMENT * elements for path, elements in norms.items()}
        ),
        "training_gmacs": _giga(_merge_blocks(training.macs_by_module)),
    }
    by_operator = {
        "forward_gmacs": _giga(forward.macs_by_operator),
        "training_gmacs": _giga(training.macs_by_operator),
    }
    calls = {"forward_calls": forward.uncounted, "training_calls": training.uncounted}
    return {
        "by_module": rows_beside("module", by_module),
        "by_operator": rows_beside("operator", by_operator),
        "not_counted": rows_beside("operator", calls),
    }


def _merge_blocks(by_module: Mapping[str, int]) -> dict[str, int]:
    """Sum values over the blocks of a stack: `blocks.0.mlp` and `blocks.1.mlp` become `blocks.*.mlp`."""
    merged: Counter[str] = Counter()
    for path, value in by_module.items():
        merged[re.sub(r"\.\d+(?=\.|$)", ".*", path) or "(the model itself)"] += value
    return dict(merged)


def _giga(values: Mapping[str, int]) -> dict[str, float]:
    return {name: value / GIGA for name, value in values.items()}


def rows_beside(key: str, columns: Mapping[str, Mapping[str, float]]) -> Table:
    """Join columns into one row per name, with 0 where a column lacks the name."""
    names = dict.fromkeys(name for values in columns.values() for name in values)
    return [
        {key: name, **{column: values.get(name, 0) for column, values in columns.items()}} for name in names
    ]
