"""Tests of the functions behind the table of selection rules, for every rule and task."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from everest_ds.config.selections import SELECTIONS
from everest_ds.models.selection import selector
from everest_ds.models.selection.selector import Selector
from tests.models import TASKS_AND_SELECTIONS, built, experiment, random_clips

KEYS = torch.tensor([101, 202, 303])


def test_every_rule_of_the_table_has_a_function_and_every_function_a_rule() -> None:
    assert selector._FUNCTIONS.keys() == SELECTIONS.keys()


@pytest.mark.parametrize(("task", "selection"), TASKS_AND_SELECTIONS)
def test_a_rule_selects_as_many_tokens_as_its_row_counts(task: str, selection: str) -> None:
    config = experiment(task, selection)
    counts = config.token_counts
    model: Any = built(config)
    clips, embedding = random_clips(config, 3), model.encoder.embed()
    split = Selector(config)(clips, embedding, KEYS)
    assert split.visible_BV.shape == (3, counts.num_visible)
    assert split.predicted_BM.shape == (3, counts.num_predicted)
    selected_BK = torch.cat([split.visible_BV, split.predicted_BM], dim=1).sort(dim=1).values
    assert bool((selected_BK.diff(dim=1) > 0).all())  # no token is visible and predicted at once
    kept_BK = Selector(config).kept(clips, embedding, KEYS).keep_BK
    if task not in config.tokens.rule.shares and config.tokens.rule.masks_tubes:
        assert kept_BK.shape == (3, counts.num_tokens)
    else:
        assert torch.equal(kept_BK, selected_BK)
