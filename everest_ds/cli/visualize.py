"""The command `everest-ds visualize`, which draws what a model selects, attends to and reconstructs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from everest_ds.cli.options import JsonFile
from everest_ds.console import print_facts, write_json
from everest_ds.errors import UsageError

if TYPE_CHECKING:
    from everest_ds.inference.look import Seen

ClipSourceArg = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A run folder, a weights file in any layout that `predict` reads, or a recipe (whose model then"
        " has its initial weights).",
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY.PATH=VALUE]...", help="Settings to change, such as tokens.keep_ratio=0.3."),
]
_FPS = 8  # frames per second, slow enough for a viewer to follow one token


def visualize(
    source: ClipSourceArg,
    video: Annotated[Path, typer.Argument(help="Video file to show to the model.")],
    overrides: Overrides = None,
    out: Annotated[Path, typer.Option(help="Folder to write the pictures to.")] = Path("pictures"),
    json_file: JsonFile = None,
) -> None:
    """Draw which tokens of a video a model keeps, attends to and reconstructs.

    The clip is from the middle of the video. kept_tokens.png and .mp4 show the tokens that the model computes
    on, and attention.png the parts of the clip that the encoder's output draws on. slots.png shows the number
    of tokens in each slot (a row of tokens in time) and the slots chosen by information-intensive frame
    selection (IIFS). reconstruction.png is the output of a pre-training model.

    Example: everest-ds visualize runs/pre clip.mp4 --out pictures
             everest-ds visualize k400_finetune_vit_base clip.mp4 tokens.keep_ratio=0.3
    """
    from everest_ds.inference.look import open_model, watch_video
    from everest_ds.inference.views import best_device

    model = open_model(source, ["data.num_workers=0", *(overrides or [])]).to(best_device())
    seen = watch_video(model, video)
    files = _write(seen, out)
    slots, tokens = seen.slots_BT[0].tolist(), model.config.tokens
    facts: dict[str, Any] = {
        "tokens": f"{int(seen.kept_BThw.sum())} kept of {seen.kept_BThw.numel()} ({tokens.selection})",
        "in_the_encoder": int(seen.visible_BThw.sum()),
        "slots": f"{len(slots)} of {seen.counts_BS.shape[1]}: {', '.join(map(str, slots))}",
        "files": ", ".join(str(file) for file in files),
    }
    print_facts(f"{video}", facts)
    write_json(json_file, facts)


def _write(seen: Seen, out: Path) -> list[Path]:
    import numpy as np
    from matplotlib.image import imsave  # imported late, because importing matplotlib is slow

    from everest_ds.data.synthetic import write_video
    from everest_ds.reports.clip_pictures import draw_clip
    from everest_ds.reports.kept_tokens import dim_discarded

    arrays: list[Any] = [None if tensor is None else tensor[0].numpy() for tensor in seen]
    clip, kept = arrays[:2]
    pictures = draw_clip(*arrays)
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, picture in pictures.items():
            imsave(out / f"{name}.png", picture)
        film = out / "kept_tokens.mp4"
        write_video(film, np.concatenate([clip, dim_discarded(clip, kept)], axis=2), fps=_FPS)
    except OSError as error:
        raise UsageError(f"{out}: cannot write the pictures", given=error.strerror or str(error)) from None
    return [*(out / f"{name}.png" for name in pictures), film]
