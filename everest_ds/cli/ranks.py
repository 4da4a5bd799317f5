"""One rank of the world that a launcher started."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from everest_ds.config import Experiment
    from everest_ds.parallel.world import World


def in_world(config: Experiment, act: Callable[[World], None], *, tell_job: bool = True) -> None:
    """Join the process group as one of its ranks, call `act`, and leave the group.

    In a SLURM job, the way in which this rank ends is logged in the run's event log, unless `tell_job` is
    false.
    """
    from everest_ds.jobs.job_ending import early_stop, logged_end
    from everest_ds.jobs.requeue import current_job
    from everest_ds.launch.environment import detect_environment

    job, place = current_job() if tell_job else None, detect_environment()
    os.environ.update(place.as_variables())
    with logged_end(job, config.run.dir, place.rank), early_stop(job):
        from everest_ds.parallel.world import explained_failures, join_world, leave_world

        world = join_world(timedelta(seconds=config.run.hang_timeout_s))
        with explained_failures(world):
            act(world)
        leave_world()
