"""The command `everest-ds data cache`, which fills a token cache.

The functions that do the work import the loader, because it imports torch.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from everest_ds.cli.options import NUM_CORES, JsonFile, Overrides, RecipeArg, Workers
from everest_ds.config import Experiment, load_experiment
from everest_ds.console import print_facts, print_problems, progress_of, write_json
from everest_ds.data.store.token_cache import CACHE, EXCLUDED_FILE
from everest_ds.errors import ConfigError, ExitCode
from everest_ds.training.input_files import manifest_of
from everest_ds.units import format_bytes


def cache(
    source: RecipeArg,
    overrides: Overrides = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the size and the predicted time, and write nothing.")
    ] = False,
    workers: Workers = NUM_CORES,
    json_file: JsonFile = None,
) -> None:
    """Fill a token cache, from which training reads its clips without decoding videos.

    The config names the folder (data.token_cache) and the number of random draws of each sample (data.draws);
    tokens.score must be pixel or codec. Training with the same config then reads the cache. The exit code is
    3 if a video cannot be read; another one takes its place, as in training. Repeat the command to resume
    after an interruption, or to repair a damaged cache.

    Example: everest-ds data cache my.yaml tokens.score=pixel data.draws=4 data.token_cache=/fast/cache
    """
    config = load_experiment(source, overrides or [])
    if config.data.token_cache is None:
        raise ConfigError(
            "data.token_cache is not set", fix="name the folder to fill: data.token_cache=FOLDER data.draws=4"
        )
    data = config.data.model_copy(update={"num_workers": workers})
    facts = _run(config.model_copy(update={"data": data}), config.data.token_cache, dry_run)
    write_json(json_file, facts)
    if facts.get("problems"):
        raise typer.Exit(ExitCode.DATA)


def _run(config: Experiment, out: Path, dry_run: bool) -> dict[str, Any]:
    """Predict, or fill the cache `out`; print and return the result."""
    from everest_ds.data.store.fill_cache import CacheFiller
    from everest_ds.data.store.shards import packing_into
    from everest_ds.training.samples import read_training_samples, record_excluded
    from everest_ds.training.token_packing import training_packer

    usable = read_training_samples(config, out / EXCLUDED_FILE)
    samples, pack = usable.samples, training_packer(config)
    assert pack is not None
    if dry_run:
        with tempfile.TemporaryDirectory() as folder:
            return _plan(CacheFiller(config, samples, pack, Path(folder)), config, out)
    inputs = {manifest_of(config, "train"), samples[0].file, samples[len(samples) // 2].file}
    with packing_into(out, inputs, CACHE):
        record_excluded(usable, out / EXCLUDED_FILE)
        filler = CacheFiller(config, samples, pack, out)
        if filler.num_known:
            with progress_of("comparing the cache with its checksums", filler.num_known) as on_progress:
                filler.verify(on_progress)
        if filler.num_left:
            _plan(filler, config, out)
            with progress_of("filling the token cache", len(samples)) as on_progress:
                filler.fill(on_progress)
        facts = {"samples": len(samples), "draws": config.data.draws, **filler.finish()}
    failures = filler.failures
    facts |= {"there_already": filler.num_known}
    problems = [(samples[each.sample].name, f"draw {each.epoch}: {each.reason}") for each in failures]
    if problems:
        print_problems(f"{len(problems)} reads failed; other videos take their places", problems, out.parent)
    print_facts(f"Token cache {out}", facts | {"bytes": format_bytes(facts["bytes"])})
    typer.echo("Train on it with the same config and overrides.")
    return facts | {"problems": problems}


def _plan(filler: Any, config: Experiment, out: Path) -> dict[str, Any]:
    """Print and return the size and time of filling the rest.

    Raises:
        DataError: if the disk of `out` has too little room.
    """
    filler.check_room(out)
    estimate = filler.estimate()
    plan = {"samples_left": filler.num_left, "draws": config.data.draws, "bytes": estimate.num_bytes}
    plan |= {"minutes": estimate.minutes, "workers": config.data.num_workers}
    print_facts("Predicted", plan | {"bytes": format_bytes(estimate.num_bytes)})
    return plan
