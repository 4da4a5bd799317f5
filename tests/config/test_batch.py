"""Tests of the batch plan: global = micro x accumulation x data-parallel ranks, or an error with a fix."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from everest_ds.config import plan_batch
from everest_ds.config.schema import BatchConfig
from everest_ds.errors import ConfigError

small = st.integers(1, 32)


@given(micro=small, accum=small, degree=small)
def test_accumulation_follows_from_a_global_batch_that_divides(micro: int, accum: int, degree: int) -> None:
    batch = BatchConfig(micro_batch_size=micro, global_batch_size=micro * accum * degree)
    plan = plan_batch(batch, degree)
    assert (plan.micro_batch_size, plan.grad_accum_steps, plan.data_parallel_degree) == (micro, accum, degree)
    assert plan.global_batch_size == batch.global_batch_size


@given(micro=small, accum=st.none() | small, degree=small)
def test_without_a_global_batch_it_grows_with_the_ranks(micro: int, accum: int | None, degree: int) -> None:
    plan = plan_batch(BatchConfig(micro_batch_size=micro, grad_accum_steps=accum), degree)
    assert plan.global_batch_size == micro * (accum or 1) * degree


@given(micro=small, accum=st.none() | small, degree=small, total=st.integers(1, 256))
def test_a_plan_adds_up_or_the_error_offers_only_what_fits(
    micro: int, accum: int | None, degree: int, total: int
) -> None:
    def batch(size: int) -> BatchConfig:
        return BatchConfig(micro_batch_size=size, global_batch_size=total, grad_accum_steps=accum)

    try:
        assert plan_batch(batch(micro), degree).global_batch_size == total
    except ConfigError as error:
        assert total != micro * degree * (accum or max(total // (micro * degree), 1))
        offered = re.search(r"micro_batch_size in \[([\d, ]+)\]", str(error))
        for size in offered[1].split(",") if offered else []:
            assert plan_batch(batch(int(size)), degree).global_batch_size == total
        fits_none = total % (degree * (accum or 1)) != 0
        assert (offered is None) == fits_none


def test_error_names_key_numbers_and_remedy() -> None:
    with pytest.raises(ConfigError) as caught:
        plan_batch(BatchConfig(micro_batch_size=3, global_batch_size=32), 4)
    message = str(caught.value)
    assert "batch.global_batch_size" in message
    assert "micro_batch_size=3" in message and "4 data-parallel ranks" in message
    assert "micro_batch_size in [1, 2, 4, 8]" in message


def test_error_names_the_multiple_when_no_micro_batch_fits() -> None:
    with pytest.raises(ConfigError, match="a global_batch_size that is a multiple of 6"):
        plan_batch(BatchConfig(global_batch_size=10, grad_accum_steps=2), 3)


def test_plan_reads_as_a_sentence() -> None:
    plan = plan_batch(BatchConfig(micro_batch_size=24, global_batch_size=384), 8)
    assert str(plan) == "384 clips = 24 per rank and micro-batch x 2 accumulated x 8 data-parallel ranks"
