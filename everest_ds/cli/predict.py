"""The commands `everest-ds features`, `probe`, `predict` and `visualize`, which apply a model to videos.

The functions import the library themselves, because it imports torch, which their help does not need.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from everest_ds.cli.options import NUM_CORES, CsvFile, JsonFile
from everest_ds.config import Experiment
from everest_ds.console import print_facts, print_problems, print_table, progress_of, write_csv, write_json
from everest_ds.data.data_set import list_samples
from everest_ds.data.ledger import Problem, Usable
from everest_ds.errors import CheckpointError, ExitCode, UsageError
from everest_ds.output_paths import refuse_input

Model = Annotated[
    Path,
    typer.Option(
        "--model",
        help="The trained model: a run folder, a checkpoint, a .safetensors file, a .pth file of VideoMAE,"
        " EVEREST, MVD or MME, or a folder of transformers' VideoMAE.",
    ),
]
ModelOverrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY.PATH=VALUE]...",
        help="Settings to change, such as data.frame_stride=2 or tokens.keep_ratio=0.6.",
    ),
]
Segments = Annotated[
    int, typer.Option(min=1, help="Number of clips from different times of a video; results are averaged.")
]
Crops = Annotated[
    int, typer.Option(min=1, help="Number of crops at different positions of a clip; results are averaged.")
]
DecodingWorkers = Annotated[
    int, typer.Option("--workers", min=0, help="Number of processes that decode videos.")
]
ProbeSource = Annotated[
    Path,
    typer.Argument(
        metavar="RUN_OR_WEIGHTS",
        help="A run folder, whose checkpoints are all probed, a checkpoint, or a file of weights in any"
        " layout that `predict` reads.",
    ),
]
ProbeTrain = Annotated[
    Path | None,
    typer.Option(
        "--train",
        metavar="MANIFEST",
        help="Labelled manifest or frame store to learn from; default: data.probe_train of the run, or its"
        " data.train.",
    ),
]
ProbeTest = Annotated[
    Path | None,
    typer.Option(
        "--test",
        metavar="MANIFEST",
        help="Labelled manifest or frame store to test on; default: with --train, a fifth of it, or else"
        " data.probe_test of the run, or its data.test.",
    ),
]
ProbeLatest = Annotated[bool, typer.Option("--latest", help="Probe only the newest checkpoint of a run.")]
ProbeFolder = Annotated[
    Path | None,
    typer.Option("--out", help="Folder of the picture and the cached features; default: probe, in the run."),
]
_NUM_WORKERS = min(8, NUM_CORES)
_MOST_SHOWN = 20  # videos whose predictions are printed


def features(
    videos: Annotated[
        Path, typer.Argument(help="A folder of videos, searched recursively, or a manifest of videos.")
    ],
    model: Model,
    out: Annotated[
        Path, typer.Option("--out", help="File to write: .npz, or .parquet if pyarrow is installed.")
    ],
    overrides: ModelOverrides = None,
    segments: Segments = 1,
    crops: Crops = 1,
    workers: DecodingWorkers = _NUM_WORKERS,
    json_file: JsonFile = None,
) -> None:
    """Write one feature vector per video: the mean of the encoder's output over the tokens that it keeps.

    The file has the columns video, label (from a manifest, otherwise -1) and features. Repeat the command to
    resume an interrupted run. Videos that cannot be read are left out, listed and recorded in
    OUT.ledger.jsonl; the exit code is then 3.

    Example: everest-ds features my_videos --model runs/pre --out features.npz
    """
    from everest_ds.inference import Views, check_table_file, extract, open_trained

    check_table_file(out)
    samples, root = list_samples(videos), videos if videos.is_dir() else videos.parent
    network = open_trained(model, [f"data.num_workers={workers}", *(overrides or [])], features=True)
    with progress_of("reading videos", len(samples)) as on_progress:
        done = extract(network, samples, root, out, Views(segments, crops), on_progress)
    facts = {
        "videos": 0 if done.table is None else len(done.table.video),
        "there_already": done.num_known,
        "left_out": len(done.problems),
        "features": "none" if done.table is None else f"{done.table.features.shape[1]} per video, float32",
        "tokens": _tokens(network.config),
    }
    print_facts(f"{out}", facts)
    _end_with(done.problems, len(samples), root, facts, json_file)


def probe(
    source: ProbeSource,
    overrides: ModelOverrides = None,
    train: ProbeTrain = None,
    test: ProbeTest = None,
    latest: ProbeLatest = False,
    segments: Segments = 1,
    crops: Crops = 1,
    out: ProbeFolder = None,
    workers: DecodingWorkers = _NUM_WORKERS,
    csv_file: CsvFile = None,
    json_file: JsonFile = None,
) -> None:
    """Measure how good the frozen features of an encoder are, without fine-tuning it.

    The encoder sees all tokens of every clip once. Linear, attentive and nearest-neighbour (kNN) probes give
    top-1 accuracies with 95 % intervals, and RankMe the effective rank of the features. probe.png shows them
    over the checkpoints. Repeat the command to resume it; finished features are kept.

    Example: everest-ds probe runs/pre --train lists/train.txt --test lists/test.txt
    """
    from everest_ds.inference import Views
    from everest_ds.probing import probed_weights as work

    views, folder = Views(segments, crops), out or work.probe_folder(source)
    found = work.find_probed(source, latest)
    settings = [f"data.num_workers={workers}", *_probe_sets(train, test), *(overrides or [])]
    scored, problems, num_videos = list[work.Scored](), dict[str, Problem](), 0
    for weights in found:
        network = work.open_frozen(weights, settings, only=len(found) == 1)
        if network is None:
            continue
        sets = _labelled_sets(network.config)
        excluded = [problem for usable in sets for problem in usable.excluded]
        num_videos = len(excluded) + sum(len(usable.samples) for usable in sets)
        with progress_of(f"{weights.name}: encoding", num_videos - len(excluded)) as on_progress:
            samples = [usable.samples for usable in sets]
            features = work.encode_sets(network, samples, folder, views, on_progress)
        with progress_of(f"{weights.name}: probing", work.NUM_PROBES) as on_progress:
            scored.append(work.Scored(weights, work.score(*work.train_and_test(features.sets), on_progress)))
        problems |= {problem.sample.name: problem for problem in (*excluded, *features.problems)}
    if not scored:
        raise CheckpointError(
            f"{source}: no checkpoint is complete", given=f"{len(found)} damaged checkpoints"
        )
    rows = [one.figures for one in scored]
    title = f"{source}: top-1 on {rows[0]['test_clips']} clips, with 95 % intervals"
    print_table(title, [one.shown for one in scored], key="weights")
    typer.echo(f"{work.write_picture(folder, scored)}: the same as a picture")
    write_csv(csv_file, rows)
    _end_with(list(problems.values()), num_videos, source, {"weights": rows}, json_file)


def _probe_sets(train: Path | None, test: Path | None) -> list[str]:
    """Return the settings that make probes learn from and be tested on the given data sets."""
    if train is None:
        if test is not None:
            raise UsageError(
                "--test was given without --train", fix="name a manifest to learn from with --train"
            )
        return []
    return [
        f"data.probe_train={train}",
        f"data.probe_test={'null' if test is None else test}",
        "data.root=null",
    ]


def _labelled_sets(config: Experiment) -> list[Usable]:
    """Read the labelled samples to probe with: those that the config names for it, or else for training."""
    from everest_ds.training.samples import read_probe_samples  # imports torch

    data = config.data
    if data.probe_train is None:
        if data.train is None:
            raise UsageError(
                "the weights name no labelled videos to probe with",
                fix="name a manifest: --train lists/train.txt",
            )
        sets = {"probe_train": data.train, "probe_test": data.test or data.val}
        config = config.model_copy(update={"data": data.model_copy(update=sets)})
    return read_probe_samples(config)


def predict(
    videos: Annotated[
        Path,
        typer.Argument(help="A video, a folder of videos, searched recursively, or a manifest of videos."),
    ],
    model: Model,
    overrides: ModelOverrides = None,
    segments: Segments = 1,
    crops: Crops = 1,
    classes: Annotated[
        Path | None,
        typer.Option(help="Text file with one class name per line, in the order of the labels."),
    ] = None,
    picture: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Single video: draw the tokens that the model keeps, and write them to FILE."
        ),
    ] = None,
    workers: DecodingWorkers = _NUM_WORKERS,
    csv_file: CsvFile = None,
    json_file: JsonFile = None,
) -> None:
    """Predict the most probable classes of each video, at most five.

    Of many videos, the first 20 are shown; --csv and --json write all. Videos that cannot be read are listed,
    and the exit code is then 3.

    Example: everest-ds predict clip.mp4 --model runs/fine
    """
    from everest_ds import inference as work

    samples, views = list_samples(videos), work.Views(segments, crops)
    single = len(samples) == 1
    if picture is not None:
        if not single:
            raise UsageError(f"--picture was given for {len(samples)} videos", fix="name a single video")
        refuse_input(picture, {samples[0].file.resolve()})
    network = work.open_trained(model, [f"data.num_workers={0 if single else workers}", *(overrides or [])])
    names = work.class_names_of(network, classes)
    with progress_of("predicting", len(samples) * views.num_views) as on_progress:
        done = work.predict_videos(network, samples, views, on_progress)
    ranked = [(samples[i].name, work.best_classes(row, names)) for i, row in done.probabilities.items()]
    rows = [work.prediction_row(video, best) for video, best in ranked]
    base = videos if videos.is_dir() else videos.parent
    if single and ranked:
        print_table(f"{videos}: the likeliest of {len(names)} classes", ranked[0][1])
    elif ranked:
        _print_first(rows, f"{len(ranked)} videos of {videos}: the likeliest of {len(names)} classes", base)
    if picture is not None and ranked:
        from everest_ds.inference.pictures import draw_kept_tokens  # imports matplotlib

        share = draw_kept_tokens(network, samples[0], picture)
        typer.echo(f"{picture}: {share:.0%} of the tokens are kept ({_tokens(network.config)})")
    write_csv(csv_file, rows)
    _end_with(done.problems, len(samples), base, {"videos": dict(ranked)}, json_file)


def _print_first(rows: Sequence[dict[str, Any]], title: str, base: Path) -> None:
    """Print the predictions of the first videos, which are named relative to `base`."""
    shown = []
    for row in rows[:_MOST_SHOWN]:
        places = [name for name in row if name != "video" and not name.endswith("_pct")]
        percent = [row["probability_pct" if name == "class" else f"{name}_pct"] for name in places]
        classes = {name: f"{row[name]} {pct:.1f} %" for name, pct in zip(places, percent, strict=True)}
        shown.append({"video": row["video"].removeprefix(f"{base}/"), **classes})
    print_table(title, shown, key="video")
    if len(rows) > len(shown):
        typer.echo(f"and {len(rows) - len(shown)} more; --csv FILE writes all")


def visualize(
    source: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A run folder, a weights file in any layout that `predict` reads, or a recipe (whose model"
            " then has its initial weights).",
        ),
    ],
    video: Annotated[Path, typer.Argument(help="Video file to show to the model.")],
    overrides: ModelOverrides = None,
    out: Annotated[Path, typer.Option(help="Folder to write the pictures to.")] = Path("pictures"),
    json_file: JsonFile = None,
) -> None:
    """Draw which tokens of a video a model keeps, attends to and reconstructs.

    The clip is from the middle of the video. kept_tokens.png and .mp4 show the tokens that the model computes
    on, and attention.png the parts of the clip that the encoder's output draws on. slots.png shows the number
    of tokens in each slot (a position in time) and the slots chosen by information-intensive frame selection
    (IIFS). reconstruction.png is the output of a pre-training model.

    Example: everest-ds visualize runs/pre clip.mp4 --out pictures
             everest-ds visualize k400_finetune_vit_base clip.mp4 tokens.keep_ratio=0.3
    """
    from everest_ds.inference.open_model import open_model
    from everest_ds.inference.pictures import watch_video, write_pictures

    model = open_model(source, ["data.num_workers=0", *(overrides or [])])
    seen = watch_video(model, video)
    files = write_pictures(seen, out, video)
    slots, tokens = seen.slots_BT[0].tolist(), model.config.tokens
    facts: dict[str, Any] = {
        "tokens": f"{int(seen.kept_BThw.sum())} kept of {seen.kept_BThw.numel()} ({tokens.selection})",
        "in_the_encoder": int(seen.visible_BThw.sum()),
        "slots": f"{len(slots)} of {seen.counts_BS.shape[1]}: {', '.join(map(str, slots))}",
        "files": ", ".join(str(file) for file in files),
    }
    print_facts(f"{video}", facts)
    write_json(json_file, facts)


def _tokens(config: Experiment) -> str:
    return f"{config.tokens.selection}, {config.token_counts.num_kept} of {config.token_counts.num_tokens}"


def _end_with(
    problems: Sequence[Problem], num_videos: int, base: Path, results: dict[str, Any], json_file: Path | None
) -> None:
    """Write the results as JSON, and list the videos that cannot be read; raise an exit if there are any."""
    rows = [{"video": problem.sample.name, "problem": problem.reason} for problem in problems]
    write_json(json_file, {**results, "problems": rows})
    if rows:
        found = [(problem.sample.name, problem.reason) for problem in problems]
        print_problems(f"{len(rows)} of {num_videos} videos cannot be read", found, base)
        raise typer.Exit(ExitCode.DATA)
