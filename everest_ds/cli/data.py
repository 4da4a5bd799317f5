"""The command `everest-ds data`, which creates, indexes, checks and re-encodes data sets.

Commands that decode videos import the decoders themselves, because those import torch.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from everest_ds.cli.options import NUM_CORES, JsonFile, ManifestArg, ManifestRoot, ShortSide, Workers
from everest_ds.config import DataConfig, load_experiment
from everest_ds.config.schema import DECODERS
from everest_ds.console import print_facts, print_problems, print_table, progress_of, write_json
from everest_ds.data.class_folders import index_folder, split_samples
from everest_ds.data.data_set import read_data_set
from everest_ds.data.folder_index import write_folder_index
from everest_ds.data.ledger import Ledger
from everest_ds.data.official import DATASETS, find_dataset, index_dataset
from everest_ds.data.official.write import MISSING_FILE, write_index
from everest_ds.data.synthetic import KINDS, MOTIONS, SyntheticSpec, synthesize
from everest_ds.data.video_files import describe_skipped
from everest_ds.data.video_list import write_manifest
from everest_ds.errors import ExitCode, UsageError
from everest_ds.output_paths import output_below


def synth(
    folder: Annotated[Path, typer.Argument(help="Folder to write the videos, manifests and class names to.")],
    train: Annotated[int, typer.Option(min=1, help="Number of training videos.")] = 2700,
    val: Annotated[int, typer.Option(min=1, help="Number of validation videos.")] = 120,
    test: Annotated[int, typer.Option(min=1, help="Number of test videos.")] = 300,
    frames: Annotated[int, typer.Option(min=2, help="Number of frames in each video.")] = 18,
    size: Annotated[int, typer.Option(min=32, help="Height and width of the frames, in pixels.")] = 32,
    seed: Annotated[int, typer.Option(help="Random seed; the same seed gives the same videos.")] = 0,
    kind: Annotated[
        str,
        typer.Option(
            help="Kind of video. plain: one object moves; busy: with camera motion, noise and other moving"
            " objects; pauses: the object stands still most of the time; panning: the camera moves over a"
            " scene full of contrast."
        ),
    ] = "plain",
    workers: Workers = NUM_CORES,
    json_file: JsonFile = None,
) -> None:
    """Create a small labelled data set of H.264 videos, in which the label is the motion of an object.

    Example: everest-ds data synth data/busy --kind busy --train 600
    """
    if kind not in KINDS:
        raise UsageError("--kind is not a known kind of video", given=kind, allowed=", ".join(KINDS))
    counts = {"train": train, "val": val, "test": test}
    with progress_of("writing videos", sum(counts.values())) as on_progress:
        manifests = synthesize(folder, counts, SyntheticSpec(frames, size, seed, kind), workers, on_progress)
    rows = [
        {"split": split, "videos": count, "classes": len(MOTIONS), "manifest": str(manifest)}
        for (split, count), manifest in zip(counts.items(), manifests, strict=True)
    ]
    print_table("Synthetic motion data set", rows)
    write_json(json_file, rows)


def index(
    source: Annotated[
        str,
        typer.Argument(
            help="A folder with one sub-folder of videos per class, or the name of a known data set: k400,"
            " ssv2, ucf101, hmdb51 or oscc (needs --annotations and --videos)."
        ),
    ],
    annotations: Annotated[
        Path | None, typer.Option(help="Known data set: folder of the official annotation files.")
    ] = None,
    videos: Annotated[
        Path | None, typer.Option(help="Known data set: folder of the videos, searched recursively.")
    ] = None,
    fold: Annotated[
        int,
        typer.Option(min=1, help="Known data set: number of the official split (UCF101, HMDB51: 1 to 3)."),
    ] = 1,
    out: Annotated[
        Path | None, typer.Option(help="Folder to write to; default: the path given as source.")
    ] = None,
    val: Annotated[
        float, typer.Option(min=0, max=1, help="Class folders: fraction of the videos for validation.")
    ] = 0.1,
    test: Annotated[
        float, typer.Option(min=0, max=1, help="Class folders: fraction of the videos for the test.")
    ] = 0.1,
    seed: Annotated[
        int, typer.Option(help="Class folders: random seed; the same seed gives the same split.")
    ] = 0,
    json_file: JsonFile = None,
) -> None:
    """Write the manifests (lists of videos and labels), class names and recipes that training needs.

    For a known data set, also write the list of missing videos. The commands to type next are printed.

    Example: everest-ds data index ucf101 --annotations ucfTrainTestlist --videos UCF-101 --out ucf101
    """
    if annotations is None and videos is None:
        _index_folder(source, out, val, test, seed, json_file)
    elif annotations is None or videos is None:
        raise UsageError(
            "only one of --annotations and --videos was given", fix="give both for a known data set"
        )
    else:
        _index_official(source, annotations, videos, fold, out or Path(source), json_file)


def _index_official(
    name: str, annotations: Path, videos: Path, fold: int, out: Path, json_file: JsonFile
) -> None:
    dataset = find_dataset(name)
    indexed = index_dataset(dataset, annotations, videos, fold)
    inputs = {file.resolve() for file in annotations.glob("*")}
    manifests = write_index(dataset, indexed, out, inputs)
    rows = [
        {
            "split": split,
            "videos": len(samples),
            "missing": len(indexed.missing[split]),
            "manifest": str(manifests.get(split, "-")),
        }
        for split, samples in indexed.splits.items()
    ]
    print_table(f"{dataset.title}: {len(indexed.classes)} classes, fold {fold}", rows)
    recipes = [_recipe(task, recipe) for task, recipe in dataset.recipes.items()]
    print_table(f"Recipes, used by {out}/pretrain.yaml and {out}/finetune.yaml", recipes)
    if any(row["missing"] for row in rows):
        typer.echo(f"warning: some videos are missing; {out / MISSING_FILE} lists them", err=True)
    if len(indexed.classes) != dataset.num_classes:
        typer.echo(
            f"warning: found {len(indexed.classes)} of the {dataset.num_classes} classes of {dataset.title}",
            err=True,
        )
    missing = {split: names for split, names in indexed.missing.items() if names}
    _print_next({task: out / f"{task}.yaml" for task in dataset.recipes})
    write_json(json_file, {"splits": rows, "missing": missing, "recipes": recipes})


def _recipe(task: str, name: str) -> dict[str, Any]:
    """Return the settings of a recipe that depend on the data set: sampling, flips and test views."""
    data = load_experiment(name).data
    views = f"{data.test_segments} x {data.test_crops}" if task == "finetune" else "-"
    return {
        "recipe": name,
        "sampling": "segments" if data.sampling == "segments" else f"stride {data.frame_stride}",
        "flip": "yes" if data.horizontal_flip else "no",
        "test_views": views,
    }


def _index_folder(
    source: str, out: Path | None, val: float, test: float, seed: int, json_file: JsonFile
) -> None:
    folder = Path(source)
    if source in DATASETS and not folder.is_dir():
        raise UsageError(
            f"--annotations and --videos are missing for the data set {source}",
            fix="give both; see everest-ds data index --help",
        )
    indexed = index_folder(folder)
    parts = split_samples(indexed.samples, (1 - val - test, val, test), seed)
    splits = dict(zip(("train", "val", "test"), parts, strict=True))
    target = out or folder
    recipes = write_folder_index(target, folder.resolve().name, splits, indexed.classes)
    rows = [
        {"split": name, "videos": len(part), "manifest": str(target / f"{name}.txt") if part else "-"}
        for name, part in splits.items()
    ]
    print_table(f"{len(indexed.samples)} videos of {len(indexed.classes)} classes", rows)
    for phrase in describe_skipped(indexed.skipped, folder):
        typer.echo(f"skipped {phrase}", err=True)
    _print_next(recipes)
    skipped = {reason: [str(path) for path in paths] for reason, paths in indexed.skipped.items()}
    write_json(json_file, {"splits": rows, "skipped": skipped})


def _print_next(recipes: Mapping[str, Path]) -> None:
    """Print the commands that check and train what was indexed."""
    typer.echo("Next, check the videos, then train (--nproc N for N GPUs; --dry-run shows the plan):")
    manifest = next(iter(recipes.values())).with_name("train.txt")
    for words in (["data", "check", str(manifest)], *([task, str(file)] for task, file in recipes.items())):
        typer.echo(f"  everest-ds {shlex.join(words)}")


def reencode(
    manifest: ManifestArg,
    out: Annotated[Path, typer.Option(help="Folder to write the videos and their manifest to.")],
    root: ManifestRoot = None,
    short_side: ShortSide = 256,
    gop: Annotated[
        int,
        typer.Option(min=1, help="Distance between key frames, in frames; a shorter one decodes faster."),
    ] = 8,
    crf: Annotated[
        int,
        typer.Option(min=0, max=51, help="Quality setting of x264; lower means better and larger videos."),
    ] = 20,
    preset: Annotated[str, typer.Option(help="Speed preset of x264, from ultrafast to veryslow.")] = "medium",
    stride: Annotated[
        int, typer.Option(min=1, help="Frame stride of the clips used to measure the speedup.")
    ] = 4,
    frames: Annotated[
        int, typer.Option(min=1, help="Number of frames in the clips used to measure the speedup.")
    ] = 16,
    workers: Workers = NUM_CORES,
    json_file: JsonFile = None,
) -> None:
    """Re-encode videos to a smaller size with frequent key frames, so that clips decode faster.

    Every new file is verified, and the speedup is measured; the exit code is 3 if a video fails. Frame
    numbers and labels stay the same, and sound is removed. Repeat the command to resume an interrupted run.

    Example: everest-ds data reencode k400/train.txt --out k400_256
    """
    from everest_ds.data.maintenance import reencode as work
    from everest_ds.data.maintenance.gain import measure_gain

    samples = read_data_set(manifest, root=root, num_classes=None, labelled=False)
    jobs = work.plan_jobs(samples, root or manifest.parent, out)
    target = output_below(out, Path(manifest.name), {manifest.resolve()})
    encoding = work.Encoding(short_side, gop, crf, preset)
    out.mkdir(parents=True, exist_ok=True)
    with progress_of("writing videos", len(jobs)) as on_progress:
        ledger = Ledger.of_manifest(target)
        result = work.reencode_videos(jobs, ledger, encoding, workers=workers, on_progress=on_progress)
    write_manifest(target, result.samples, out)
    failed = [(sample.name, reason) for sample, reason in result.failed]
    if failed:
        print_problems(
            f"{len(failed)} of {len(jobs)} videos were not written", failed, root or manifest.parent
        )
    facts: dict[str, Any] = {"manifest": str(target), "videos": len(result.samples)}
    facts |= {"there_already": result.num_known, "failed": len(failed)}
    pairs = work.pairs_to_time(jobs, result.samples)
    gain = measure_gain(pairs, DataConfig(frame_stride=stride), frames)
    facts |= {} if gain is None else gain.facts(f"{frames} frames at stride {stride}")
    print_facts("Re-encoded videos", facts)
    write_json(json_file, {**facts, "problems": failed})
    if failed:
        raise typer.Exit(ExitCode.DATA)


def check(
    manifest: ManifestArg,
    root: ManifestRoot = None,
    min_frames: Annotated[
        int, typer.Option(min=1, help="Number of frames below which a video is listed as too short.")
    ] = 1,
    every_frame: Annotated[
        bool, typer.Option("--every-frame", help="Decode all frames of each video, not only its two ends.")
    ] = False,
    decoder: Annotated[
        str, typer.Option(help="decord (independent of runs, which read with PyAV), pyav or torchcodec.")
    ] = "decord",
    timeout: Annotated[
        float, typer.Option(min=0.1, help="Seconds after which an unfinished video counts as broken.")
    ] = 120.0,
    workers: Workers = NUM_CORES,
    json_file: JsonFile = None,
) -> None:
    """Open every video of a manifest, decode its first and last frames, and list the broken videos.

    The exit code is 3 if any video is broken or too short. The results are kept in a ledger beside the
    manifest (MANIFEST.ledger.jsonl). Repeating the command resumes an interrupted check and skips files that
    have not changed; training excludes the videos that the ledger lists as broken.
    """
    from everest_ds.data.maintenance.check import check_manifest

    samples = read_data_set(manifest, root=root, num_classes=None, labelled=False)
    ledger = Ledger.of_manifest(manifest)
    with progress_of("checking videos", len(samples)) as on_progress:
        checked = check_manifest(
            samples,
            ledger,
            _data_config(decoder),
            min_frames=min_frames,
            workers=workers,
            on_progress=on_progress,
            every_frame=every_frame,
            timeout_s=timeout,
        )
    found = {"problems": checked.problems, "too_short": checked.too_short}
    titles = {"problems": "are broken", "too_short": f"have fewer than {min_frames} frames"}
    for kind, problems in found.items():
        if problems:
            pairs = [(problem.sample.name, problem.reason) for problem in problems]
            title = f"{len(problems)} of {len(samples)} videos {titles[kind]}"
            print_problems(title, pairs, root or manifest.parent)
    rows = {
        kind: [{"video": problem.sample.name, "problem": problem.reason} for problem in problems]
        for kind, problems in found.items()
    }
    if not any(rows.values()):
        typer.echo(f"{manifest}: all {len(samples)} videos can be read")
    if checked.num_known:
        typer.echo(f"{checked.num_known} of {len(samples)} results were already in {ledger.path}")
    facts = {"checked": len(samples), "known": checked.num_known, "ledger": str(ledger.path)}
    write_json(json_file, {**facts, **rows})
    if any(rows.values()):
        raise typer.Exit(ExitCode.DATA)


def _data_config(decoder: str) -> DataConfig:
    """Return a `data` section that reads videos with the given decoder.

    Raises:
        UsageError: if the decoder is unknown.
        ConfigError: if the decoder is not installed.
    """
    from everest_ds.data.decoding.open_video import require_decoder

    if decoder not in DECODERS:
        raise UsageError("--decoder is not a known decoder", given=decoder, allowed=", ".join(DECODERS))
    require_decoder(decoder)
    return DataConfig.model_validate({"decoder": decoder})
