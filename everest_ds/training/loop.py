"""The training loop of pre-training and fine-tuning: set-up, steps, reports, checkpoints, resuming."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from everest_ds.checkpoints.names import list_checkpoints
from everest_ds.checkpoints.sealed_manifest import Facts
from everest_ds.config import BatchPlan, Experiment, plan_ranks
from everest_ds.config.deepspeed_claims import notes_on
from everest_ds.config.deepspeed_file import read_deepspeed_file
from everest_ds.config.mesh_shape import MeshShape
from everest_ds.data.clip_batches import Batch
from everest_ds.data.clips import training_batches
from everest_ds.data.order import FINGERPRINT, fingerprint, steps_per_epoch, was_saved_with
from everest_ds.data.reading import Failure
from everest_ds.data.store.staging import read_from_stage
from everest_ds.data.store.token_cache import TokenCache, open_token_cache
from everest_ds.data.video_list import Sample
from everest_ds.errors import CheckpointError, DivergedError, StoppedError
from everest_ds.log import logger, setup_logging
from everest_ds.models.initial_weights import outline
from everest_ds.parallel.batch_exchange import announce_batches, receive_batch
from everest_ds.parallel.checkpointing import load_checkpoint, newest_complete, save_model
from everest_ds.parallel.ds_config import resolve_ds_config
from everest_ds.parallel.engine import Engine, build_engine, gradient_norm, set_learning_rate, step_skipped
from everest_ds.parallel.mesh import Mesh, form_mesh
from everest_ds.parallel.nvme import remove_swap_files
from everest_ds.parallel.world import World
from everest_ds.training.evaluate import evaluate_views, probe_encoder
from everest_ds.training.input_files import check_evaluation_inputs, check_initial_weights_exist
from everest_ds.training.loss_watch import LossWatch
from everest_ds.training.observers import (
    MetricsFile,
    Observer,
    ProbeReport,
    ProgressLine,
    StepReport,
    TensorBoard,
    ValidationReport,
    draw_pictures,
    watch,
)
from everest_ds.training.optimization import Objective, build_objective, build_schedule, parameter_groups
from everest_ds.training.prefetch import Prefetcher, Preparation
from everest_ds.training.preflight import stage_shards
from everest_ds.training.run_folder import RunFolder, package_versions, read_metrics
from everest_ds.training.samples import BrokenVideos, read_samples, read_training_samples, record_excluded
from everest_ds.training.saver import Saver
from everest_ds.training.stop import GRACE_FILE, Grace, StopReason, StopRequest
from everest_ds.training.throughput import ClipCost, StepTimer, Waited, take_peak_memory_bytes
from everest_ds.training.token_packing import training_packer
from everest_ds.training.watchdog import Watchdog
from everest_ds.training.weights import initial_weights


def train(
    config: Experiment, world: World, cost: ClipCost | None = None, signal_s: float | None = None
) -> bool:
    """Train to the end of the experiment, resuming from its run folder if it has one. Call on every rank.

    Args:
        config: the run config.
        world: the ranks of the run.
        cost: cost of a clip, for reporting FLOP/s and MFU; without it they are null.
        signal_s: seconds between SLURM's stop signal and the end of the job; if they are too few to save, a
            warning is logged.

    Returns:
        True if all steps of the schedule are done, False if the run ended before, at `run.max_steps`.

    Raises:
        StoppedError: after a stop signal or the file `kill`, when a checkpoint has been saved.
        EverestError: for any other problem that the user can fix.
    """
    plan = plan_ranks(config, world.size)
    mesh = form_mesh(world, MeshShape.of(config, world.size))
    folder = RunFolder(config.run.dir)
    usable = world.share(lambda: read_training_samples(config, folder.excluded))
    world.share(lambda: check_evaluation_inputs(config))
    world.share(lambda: check_initial_weights_exist(config))
    samples = usable.samples
    cache = world.share(lambda: open_token_cache(config, samples))
    steps_per_epoch(len(samples), plan)
    ds_config = world.share(lambda: resolve_ds_config(config, world.size, len(samples)))
    world.share(lambda: folder.open(config, ds_config, world.size))
    world.share(lambda: record_excluded(usable, folder.excluded))
    setup_logging(world.rank, folder.logs)
    for note in notes_on(read_deepspeed_file(config)) if world.is_main else ():
        logger.info("%s: %s", config.parallelism.ds_config, note)
    try:
        if cache is None:
            samples = stage_shards(config, config.task, samples, world, folder.path)
        else:
            cache = stage_shards(config, config.task, cache, world, folder.path)
        model = outline(config)  # on the meta device: no rank needs memory for more than its share
        groups = parameter_groups(model, config.optimizer)
        init_from = None if list_checkpoints(folder.checkpoints) else config.model.init_from
        with initial_weights(config, init_from) as weights:
            engine = build_engine(model, groups, config, ds_config, mesh, weights)
        grace = Grace(signal_s, folder.path / GRACE_FILE if world.is_main else None)
        run = TrainingRun(config, plan, samples, engine, folder, mesh, cost, grace, cache)
        watchdog = Watchdog(folder.stacks(world.rank), config.run.hang_timeout_s)
        with StopRequest(folder.path if world.is_main else None) as stop, watchdog:
            run.to_the_end(stop, watchdog)
        engine.destroy()
    finally:
        remove_swap_files(config, world.rank)
        folder.close()
    return run.step >= run.schedule.total_steps


class TrainingRun:
    """The training loop of one rank, once the engine and the run folder are set up."""

    def __init__(
        self,
        config: Experiment,
        plan: BatchPlan,
        samples: Sequence[Sample],
        engine: Engine,
        folder: RunFolder,
        mesh: Mesh,
        cost: ClipCost | None,
        grace: Grace,
        cache: TokenCache | None,
    ) -> None:
        self.config = config
        self.plan = plan
        self.samples = samples
        self.engine = engine
        self.folder = folder
        self.mesh = mesh
        self.world = mesh.world
        self.cost = cost
        self.grace = grace
        self.objective: Objective = build_objective(config)
        self.prepare = Preparation(config, mesh.world.device)
        self.cache = cache
        self.steps_per_epoch = steps_per_epoch(len(samples), plan)
        self.schedule = build_schedule(config.schedule, self.steps_per_epoch, plan.samples_per_step)
        self.last_step = min(config.run.max_steps or self.schedule.total_steps, self.schedule.total_steps)
        self.data_fingerprint = self.world.share(lambda: fingerprint(samples, config.run.seed))
        self.step = self._resume()
        self.broken = BrokenVideos(samples, config.data, folder.broken, self.world)
        self.broken.forget_after(self.step)
        self.observers: list[Observer] = []
        if self.world.is_main:
            self.observers = [
                MetricsFile(folder.metrics),
                TensorBoard(folder.tensorboard, self.step + 1),
                ProgressLine(self.last_step, self.step),
            ]
        self.timer = StepTimer(self.world.device)
        self.losses = LossWatch(samples, config, self.world)
        self.saver = Saver(engine, folder.checkpoints, config, mesh, grace)
        self.batch: Batch  # the latest micro-batch, from which pictures are drawn

    def to_the_end(self, stop: StopRequest, watchdog: Watchdog) -> None:
        """Run every remaining step, with the reports, validations and checkpoints due after it."""
        batches = self._batches()
        self.timer.restart()
        try:
            while not self.finished:
                watchdog.beat()
                started = time.perf_counter()
                loss = self._train_step(batches)
                self.step += 1
                self.timer.steps += 1
                self._report(loss)
                self._draw()
                self._validate()
                self._probe()
                self.grace.note_step(time.perf_counter() - started)
                self._save_or_stop(stop)
        except DivergedError:  # raised on every rank, possibly while an earlier checkpoint is being written
            self.saver.finish()
            raise
        finally:
            for observer in self.observers:
                observer.close()

    @property
    def finished(self) -> bool:
        """True if all steps are done; after a restart with a lower `run.max_steps`, perhaps more."""
        return self.step >= self.last_step

    def _train_step(self, batches: Prefetcher) -> Tensor:
        """Run one optimiser step and return this rank's mean loss, without waiting for the device."""
        set_learning_rate(self.engine, self.schedule.lr(self.step))
        losses = []
        for _ in range(self.plan.grad_accum_steps):
            # An error of one rank's loader is raised on all; otherwise the others would wait in a collective.
            ready = self.world.together(batches.take)
            self.batch = receive_batch(ready, self.mesh)
            loss = self.objective(self.engine, self.batch)
            self.losses.note(self.step + 1, loss.detach(), ready.items)
            # The next batch is fetched while a GPU computes the forward pass. After backward() may be too
            # late: with overlapping communication, DeepSpeed waits for the device at its end.
            batches.fetch()
            self.engine.backward(loss)
            self.engine.step()  # updates the weights at the last micro-batch
            losses.append(loss.detach())
        if step_skipped(self.engine):
            self.losses.skipped(self.step + 1)
        return torch.stack(losses).mean()

    def _due(self, every_steps: int) -> bool:
        return self.finished or self.step % every_steps == 0

    def _report(self, loss: Tensor) -> None:
        if not self._due(self.config.run.log_every_steps):
            return
        self.losses.check()
        replaced = self.broken.collect(self.step, (self.step - 1) // self.steps_per_epoch)
        timer, cost, num_ranks = self.timer, self.cost, self.world.size
        skipped, mean_loss = step_skipped(self.engine), float(self.world.mean(loss))
        seconds = timer.seconds  # read after the loss, for which the host had to wait for the device
        clips_per_s = timer.steps * self.plan.global_batch_size / seconds
        report = StepReport(
            step=self.step,
            epoch=self.step / self.steps_per_epoch,
            loss=None if skipped else mean_loss,
            lr=self.schedule.lr(self.step - 1),
            grad_norm=None if skipped else gradient_norm(self.engine),
            clips_per_s=clips_per_s,
            data_wait_pct=100 * timer.waited / seconds,
            replaced_videos=replaced,
            memory_bytes=take_peak_memory_bytes(self.world.device),
            tflops_per_s=None if cost is None else cost.tflops_per_s(clips_per_s, num_ranks),
            mfu_pct=None if cost is None else cost.mfu_pct(clips_per_s, num_ranks),
        )
        for observer in self.observers:
            observer.on_step(report)
        timer.restart()

    def _draw(self) -> None:
        if not self._due(self.config.run.image_every_steps):
            return
        with self.timer.paused(), torch.no_grad():
            seen = watch(self.engine, self.batch)
            pictures = draw_pictures(seen) if self.observers else {}
            for observer in self.observers:
                for name, picture in pictures.items():
                    observer.on_picture(self.step, name, picture)

    def _validate(self) -> None:
        every_steps = self.config.run.validate_every_epochs * self.steps_per_epoch
        if self.config.task == "pretrain" or self.config.data.val is None or not self._due(every_steps):
            return
        with self.timer.paused():
            self._validate_now()

    def _validate_now(self) -> None:
        self.losses.check()
        usable = self.world.share(lambda: read_samples(self.config, "val"))
        samples = read_from_stage(usable.samples, self.config.data.stage)
        result = evaluate_views(self.engine, samples, self.config, self.mesh, segments=1, crops=1)
        report = ValidationReport(
            step=self.step,
            epoch=self.step / self.steps_per_epoch,
            val_loss=result.loss,
            val_top1=result.top(1),
            val_top5=result.top5,
            val_missing=len(usable.excluded) + len(result.missing),
        )
        best = self.world.share(
            lambda: max((row.get("val_top1", -1.0) for row in read_metrics(self.folder.path)), default=-1.0)
        )
        for observer in self.observers:
            observer.on_validation(report)
        if report.val_top1 > best:
            file, metadata = self.folder.best_weights, {"task": self.config.task}
            save_model(self.engine.module, file, metadata, self.mesh)

    def _probe(self) -> None:
        every_steps = self.config.run.probe_every_steps
        if every_steps is None or not self._due(every_steps):
            return
        with self.timer.paused():
            self.losses.check()
            scores, num_missing = probe_encoder(self.engine, self.config, self.mesh)
        report = ProbeReport.of(scores, self.step, self.step / self.steps_per_epoch, num_missing)
        for observer in self.observers:
            observer.on_probe(report)

    def _save_or_stop(self, stop: StopRequest) -> None:
        reason = StopReason(self.world.greatest(stop.reason()))
        if reason or self._due(self.config.run.save_every_steps):
            with self.timer.paused():
                self.losses.check()
                self.broken.collect(self.step, (self.step - 1) // self.steps_per_epoch)
                self.saver.save(self._facts())
        else:
            self.saver.poll()
        if reason or self.finished:
            self.saver.finish()
        stop.acknowledge(reason)
        if reason.stops and not self.finished:
            raise StoppedError(
                f"stopped after step {self.step} of {self.last_step}, saved in {self.folder.path}",
                step=self.step,
                by=reason.origin,
                fix="run the same command again to resume",
            )

    def _facts(self) -> dict[str, Any]:
        epoch, step_of_epoch = divmod(self.step, self.steps_per_epoch)
        config, batch = self.config, self.plan.global_batch_size
        return {
            "step": self.step,
            "task": config.task,
            "global_batch_size": batch,
            "position": {
                "epoch": epoch,
                "step_of_epoch": step_of_epoch,
                "clips_seen": self.step * batch,
                "samples": len(self.samples),
                FINGERPRINT: self.data_fingerprint,
            },
            "world": {
                "ranks": self.world.size,
                "tensor": self.mesh.degrees.tensor,
                "zero_stage": config.parallelism.zero_stage,
                "precision": config.precision,
            },
            "schedule": asdict(self.schedule),
            "random": {"seed": config.run.seed, "drawn_from": "seed, epoch and sample of each clip"},
            "config": config.model_dump(mode="json"),
            "versions": package_versions(),
        }

    def _resume(self) -> int:
        """Load the newest complete checkpoint and return its step, or 0 if there is none."""
        found = newest_complete(self.folder.checkpoints, self.world)
        step = 0
        if found is not None:
            path, manifest = found
            self._check_continues(path, manifest.facts)
            load_checkpoint(self.engine, path, manifest, self.mesh)
            step = manifest.facts.step
            logger.info("resuming from %s", path)
        self.world.share(lambda: self.folder.drop_metrics_after(step))
        return step

    def _check_continues(self, path: Path, facts: Facts) -> None:
        """Check that a checkpoint has this run's samples and global batch size, on any number of ranks.

        Raises:
            CheckpointError: if the samples or the global batch size differ.
        """
        here = self.plan.global_batch_size
        seed = self.config.run.seed
        if not self.world.share(lambda: was_saved_with(facts.position, self.samples, seed)):
            raise CheckpointError(
                f"{path}: saved with other training samples, so the epoch cannot be continued",
                given=f"{len(self.samples)} samples in data.train now",
                allowed=f"the {facts.position.get('samples')} samples of the checkpoint, with the same paths,"
                " labels and spans, in the same order",
                fix="restore the manifest, or start over in another run.dir",
            )
        if facts.global_batch_size != here:
            raise CheckpointError(
                f"{path}: saved with another global batch",
                given=f"{self.plan} now",
                allowed=f"{facts.global_batch_size} clips",
                fix=f"set batch.global_batch_size={facts.global_batch_size}; accumulation is then adjusted",
            )

    def _batches(self) -> Prefetcher:
        steps, noted = range(self.step, self.last_step), list[Failure]()
        batches = training_batches(
            self.samples,
            self.config,
            self.plan,
            self.mesh.share,
            steps,
            pin_memory=self.world.device.type == "cuda",
            on_failure=noted.append,
            pack=training_packer(self.config),
            turn=self.mesh.turn,
            cache=self.cache,
        )
        return Prefetcher(
            Waited(batches, self.timer),
            len(steps) * self.plan.grad_accum_steps,
            noted,
            self.broken.note,
            self.prepare,
            self.world.device,
            partial(announce_batches, mesh=self.mesh, waiting=self.timer.waiting),
        )
