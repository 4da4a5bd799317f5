"""`everest-ds submit chain`: pretrain, finetune, evaluate and report, one job after the other."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace

from everest_ds.config.load import load_task
from everest_ds.errors import UsageError
from everest_ds.jobs.job_checks import Stage, Target, check_run, without_gpus

_STAGES = ("pretrain", "finetune", "evaluate")


def plan_chain(words: Sequence[str], target: Target) -> list[Stage]:
    """Plan the four jobs of a chain; fine-tuning starts from the weights of the pre-training run.

    Args:
        words: the two recipes, then overrides: `finetune.key.path=value` for one stage, else for all.
        target: the hardware of the jobs.

    Raises:
        EverestError: if one of the jobs would fail at its start.
    """
    if len(words) < 2:
        raise UsageError(
            "chain needs two recipes",
            given=" ".join(words) or "none",
            fix="name a pretrain and a finetune recipe",
        )
    sources, given = dict(zip(("pretrain", "finetune"), words[:2], strict=True)), words[2:]
    common = [text for text in given if text.partition(".")[0] not in _STAGES]
    overrides = {stage: [*common, *_own(stage, given)] for stage in _STAGES}
    before = load_task("pretrain", sources["pretrain"], overrides["pretrain"])
    overrides["finetune"].append(f"model.init_from={json.dumps(str(before.run.dir))}")
    after = load_task("finetune", sources["finetune"], overrides["finetune"])
    if before.run.dir == after.run.dir:
        raise UsageError(
            "both runs of the chain have the same run.dir",
            given=str(after.run.dir),
            fix="give pretrain.run.dir=... and finetune.run.dir=...",
        )
    trained, tuned = str(before.run.dir), str(after.run.dir)
    later = replace(target, inputs_follow=True)
    shape = target.shape
    tested = load_task("evaluate", sources["finetune"], [*overrides["finetune"], *overrides["evaluate"]])
    trainings = [
        Stage(task, (sources[task], *overrides[task]), run.run.dir, shape, check_run(task, run, place))
        for task, run, place in (("pretrain", before, target), ("finetune", after, later))
    ]
    return [
        *trainings,
        Stage(
            "evaluate",
            (tuned, *_own("evaluate", given)),
            after.run.dir,
            shape,
            check_run("evaluate", tested, later),
        ),
        Stage(
            "report",
            (trained, tuned, "--out", str(after.run.dir / "report")),
            after.run.dir,
            without_gpus(target).shape,
        ),
    ]


def dependency_on(before: Sequence[str], command: str) -> str | None:
    """Return the value of sbatch's `--dependency` for a job of a chain; None for its first job.

    Args:
        before: ids of the jobs before it, in their order.
        command: the job's command, which says whether the job before must have succeeded.
    """
    if not before:
        return None
    if needs_success(command):
        return f"afterok:{before[-1]}"
    return ",".join([*(f"afterok:{job}" for job in before[-2:-1]), f"afterany:{before[-1]}"])


def needs_success(command: str) -> bool:
    """Return whether a job of a chain needs the success of the job just before it.

    The report does not: a test in which videos are missing counts as failed, but has figures to report.
    """
    return command != "report"


def _own(stage: str, given: Sequence[str]) -> list[str]:
    return [text.removeprefix(f"{stage}.") for text in given if text.startswith(f"{stage}.")]
