"""The commands that use a trained model. What one needs is imported inside it, as in cli.py."""

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import rich
import typer
from rich.table import Table

from distill.cli.shell import EXIT_INPUT, clean_exit, configure_log, print_plain
from distill.errors import InputError

if TYPE_CHECKING:
    from distill.data.index import Clip
    from distill.use.export import Exported
    from distill.use.predict import LoadedModel, Result

CheckpointArgument = Annotated[
    str,
    typer.Argument(
        metavar="CHECKPOINT",
        help="A run's folder, a checkpoint in it, an export, or a file of weights.",
    ),
]
VideosArgument = Annotated[
    list[str],
    typer.Argument(
        metavar="VIDEO...",
        help="Video files, folders of them, or list files (.csv, .tsv, .txt) as for training.",
    ),
]
RecipeOption = Annotated[
    str | None,
    typer.Option(
        metavar="RECIPE",
        help="What a released file is of, such as k400/L14; files of our own say so themselves.",
        show_default=False,
    ),
]
NamesOption = Annotated[
    str | None,
    typer.Option(
        metavar="FILE",
        help="Class names, one a line, where the weights carry none.",
        show_default=False,
    ),
]
PrefixOption = Annotated[
    str | None,
    typer.Option(
        metavar="FOLDER", help="Where a list's videos lie, if not beside it.", show_default=False
    ),
]
WorkersOption = Annotated[int, typer.Option(min=1, help="Processes that decode.")]


def add_use_commands(app: typer.Typer) -> None:
    """Register the commands of this file."""
    app.command()(export)
    app.command()(predict)
    app.command()(features)


def export(
    checkpoint: CheckpointArgument,
    to: Annotated[
        list[str],
        typer.Option(
            "--to",
            metavar="TARGET",
            help="safetensors, timm, hub, onnx or torch-export; may be given several times.",
            show_default=False,
        ),
    ],
    out: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER",
            help="Where it goes; export/TARGET beside the weights when not given.",
            show_default=False,
        ),
    ] = None,
    recipe: RecipeOption = None,
    names: NamesOption = None,
    video: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Compare on clips of this video; one is made when not given.",
            show_default=False,
        ),
    ] = None,
    licence: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Of the weights, for the model card, such as apache-2.0.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Write a model for use elsewhere: the student alone, its settings and a model card.

    What is written is loaded again by the target's own loader, and its outputs on real clips are
    compared with the original's: where they differ by more than 1e-4 nothing is kept.

        distill export runs/quickstart/finetuned --to onnx
    """
    with clean_exit():
        configure_log()
        from distill.use.export import TARGETS
        from distill.use.export import export as write_export

        wrong = [target for target in to if target not in TARGETS]
        if wrong:
            raise InputError(f"--to {wrong[0]}: no such target; choose of {', '.join(TARGETS)}")
        if out is not None and len(to) > 1:
            raise InputError("--out is for one target; give one --to, or leave --out")
        made = []
        for target in dict.fromkeys(to):
            one = write_export(
                checkpoint,
                target,
                folder=out,
                recipe=recipe,
                names=names,
                video=video,
                licence=licence,
            )
            print_plain(f"{one.folder}: {', '.join(one.files)}")
            made.append(one)
        _show_exports(made)


def _show_exports(made: "Sequence[Exported]") -> None:
    table = Table()
    table.add_column("target")
    for title in ("MB", "ms a clip, CPU", "the original's", "largest difference"):
        table.add_column(title, justify="right")
    for one in made:
        table.add_row(
            one.target,
            f"{sum(one.files.values()) / 1e6:.1f}",
            f"{1e3 * one.latency_seconds:.1f}",
            f"{1e3 * one.original_seconds:.1f}",
            f"{one.difference:.1e}",
        )
    rich.print(table)


def predict(
    checkpoint: CheckpointArgument,
    videos: VideosArgument,
    recipe: RecipeOption = None,
    names: NamesOption = None,
    prefix: PrefixOption = None,
    top: Annotated[int, typer.Option(min=1, help="Classes to show.")] = 5,
    clips: Annotated[
        int | None,
        typer.Option(
            min=1, help="Clips of a video; as in evaluation when not given.", show_default=False
        ),
    ] = None,
    crops: Annotated[
        int | None,
        typer.Option(
            min=1, help="Crops of a clip; as in evaluation when not given.", show_default=False
        ),
    ] = None,
    workers: WorkersOption = 2,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say what is in videos: the likeliest classes of each, as an evaluation would score them.

    A video that cannot be read is named and the others go on; the exit code is 2 then.

        distill predict runs/quickstart/finetuned holiday.mp4 more/videos
    """
    with clean_exit():
        loaded, found = _open(
            checkpoint, videos, recipe=recipe, names=names, prefix=prefix, as_json=as_json
        )
        results = loaded.predict_all(found, clips=clips, crops=crops, workers=workers)
        if as_json:
            print_plain(json.dumps(_report(loaded, results, top=top), indent=1, ensure_ascii=False))
        else:
            _show(loaded, results, top=top)
        _name_problems(results)


def features(
    checkpoint: CheckpointArgument,
    videos: VideosArgument,
    out: Annotated[str, typer.Option(metavar="FILE", help="The .safetensors file to write.")],
    recipe: RecipeOption = None,
    prefix: PrefixOption = None,
    clips: Annotated[int, typer.Option(min=1, help="Clips of a video.")] = 1,
    crops: Annotated[int, typer.Option(min=1, help="Crops of a clip.")] = 1,
    workers: WorkersOption = 2,
) -> None:
    """Write a vector for each video, the mean over its views, with the videos' names.

    `features` float32 [n,P] is what the model's attention pool emits; the file's metadata has
    `names`, a JSON list of n. A video that cannot be read is named and left out; the exit code is
    2 then.

        distill features runs/S14 videos --out features.safetensors
    """
    with clean_exit():
        from distill.use.predict import write_features

        loaded, found = _open(checkpoint, videos, recipe=recipe, prefix=prefix)
        results = loaded.features_of_all(found, clips=clips, crops=crops, workers=workers)
        shape = write_features(out, loaded, results, clips=clips, crops=crops)
        print_plain(f"{out}: features {shape[0]:,} x {shape[1]:,}")
        _name_problems(results)


def _open(
    checkpoint: str,
    videos: list[str],
    *,
    recipe: str | None,
    prefix: str | None,
    names: str | None = None,
    as_json: bool = False,
) -> "tuple[LoadedModel, list[Clip]]":
    """The model, and the clips that are asked for."""
    configure_log()
    if as_json:
        rich.reconfigure(stderr=True)  # all but the result
    from distill.use.predict import find_videos, load_model

    found = find_videos(videos, prefix=prefix)
    return load_model(checkpoint, recipe=recipe, names=names), found


def _report(loaded: "LoadedModel", results: "Sequence[Result]", *, top: int) -> list[dict]:
    """The results as JSON values."""
    return [
        {
            "video": result.title,
            "top": None
            if result.values is None
            else [guess._asdict() for guess in loaded.guesses(result.values, top=top)],
            "problem": result.problem,
        }
        for result in results
    ]


def _show(loaded: "LoadedModel", results: "Sequence[Result]", *, top: int) -> None:
    has_names = bool(loaded.description.class_names)
    for result in results:
        if result.values is None:
            continue
        print_plain(result.title)
        for guess in loaded.guesses(result.values, top=top):
            name = guess.name if has_names else f"class {guess.name}"
            print_plain(f"  {100 * guess.probability:5.1f} %  {name}")


def _name_problems(results: "Sequence[Result]") -> None:
    """A line for each video of which views are missing, and the exit code that says so."""
    problems = [result.problem for result in results if result.problem]
    if problems:
        lines = [*problems, f"{len(problems)} of {len(results)} videos could not be read in full"]
        print_plain("\n".join(lines), stderr=True)
        raise typer.Exit(EXIT_INPUT)
