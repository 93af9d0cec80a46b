"""README.md of an export: what the model is, how it was made, how good it is and how to use it."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from torch import nn

from distill import recipe as schema
from distill.errors import InputError
from distill.evaluation.scores import RESULT_FILE
from distill.log import size_text
from distill.recipe_file import load_recipe
from distill.run.folder import RECIPE
from distill.students.warmstart import WeightsError, file_sha256, weights_file
from distill.use.describe import Description

LONGEST_CHAIN = 10  # runs that started one from another
METRICS = {
    "top1": "top-1 accuracy",
    "top5": "top-5 accuracy",
    "mean_class_accuracy": "mean class accuracy",
    "map": "mean average precision",
}
LIBRARIES = {"timm": "timm", "onnx": "onnx", "torch-export": "pytorch"}
HUB_LINK = re.compile(r"huggingface\.co/([\w.-]+/[\w.-]+)")
LOAD = {
    "safetensors": """\
import distill

model = distill.load_model("{folder}")
{use}""",
    "timm": """\
import distill.students.timm_models  # registers the architecture
import timm

model = timm.create_model("local-dir:{folder}", pretrained=True).eval()
{output} = model(clip)  # or "hf-hub:USER/NAME" once it is there""",
    "hub": """\
from distill.students.hub import VideoModel

model = VideoModel.from_pretrained("{folder}")  # or "USER/NAME" once it is on the hub
{output} = model(clip)""",
    "onnx": """\
import onnxruntime

session = onnxruntime.InferenceSession("{folder}/model.onnx")
({output},) = session.run(None, {{"clip": clip}})  # float32, any batch""",
    "torch-export": """\
import torch

model = torch.export.load("{folder}/model.pt2").module()
{output} = model(clip)  # float32, any batch""",
}


def model_card(
    model: nn.Module,
    description: Description,
    file: Path,
    *,
    target: str,
    sizes: Mapping[str, int],
    difference: float,
    licence: str | None,
) -> str:
    """The card as Markdown with YAML at its head, filled from what lies beside the weights.

    Numbers are those of an evaluation of exactly this file; `sizes` are the files' in bytes.
    """
    chain = read_chain(file)
    evaluation = find_evaluation(file)
    data = card_data(description, chain, evaluation, target=target, licence=licence)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    sections = (
        opening(description, chain),
        "## Use",
        usage(description, target),
        "## Input",
        *input_lines(description),
        "## Model",
        f"- {architecture(description)}, {parameters:,} parameters\n"
        f"- {', '.join(f'{name} {size_text(size)}' for name, size in sizes.items())}\n"
        f"- loaded again and run on real clips it differs from the original by {difference:.1e} "
        "at most",
        "## Training",
        *training_lines(chain),
        "## Results",
        results(evaluation, description),
        "## Licence",
        licence_lines(licence, chain),
    )
    return f"---\n{data.to_yaml().strip()}\n---\n\n" + "\n\n".join(sections) + "\n"


def read_chain(file: Path) -> list[schema.Recipe]:
    """The recipes of the run that made a file and of those before it, as far as they are there."""
    chain: list[schema.Recipe] = []
    while len(chain) < LONGEST_CHAIN:
        folder = file.parent
        folder = folder.parent.parent if folder.name.startswith("step-") else folder
        try:
            recipe = load_recipe(folder / RECIPE)
        except InputError:
            break
        if not isinstance(recipe, schema.Recipe):
            break
        chain.append(recipe)
        try:
            file = weights_file(recipe.model.weights.checkpoint) if recipe.model.weights else None
        except WeightsError:
            break
        if file is None:
            break
    return chain


def find_evaluation(file: Path) -> dict[str, Any] | None:
    """The latest evaluation beside the weights that was of this very file."""
    digest = file_sha256(file)
    found = [file.parent / RESULT_FILE, *file.parent.glob(f"*/{RESULT_FILE}")]
    found = sorted(filter(Path.is_file, found), key=lambda path: path.stat().st_mtime)
    for path in reversed(found):
        result = json.loads(path.read_text(encoding="utf-8"))
        if result.get("manifest", {}).get("run", {}).get("weights_sha256") == digest:
            return result
    return None


def card_data(
    description: Description,
    chain: Sequence[schema.Recipe],
    evaluation: Mapping[str, Any] | None,
    *,
    target: str,
    licence: str | None,
) -> ModelCardData:
    """The card's head, as the hub reads it."""
    name = description.recipe
    links = [HUB_LINK.search(text or "") for text in (source for *_, source in teachers(chain))]
    results = None
    if evaluation is not None:
        run = evaluation["manifest"]["run"]
        results = [
            EvalResult(
                task_type="video-classification",
                dataset_type=Path(run["list"]).stem,
                dataset_name=f"{Path(run['list']).name} ({run['split']})",
                metric_type="accuracy" if key != "map" else "map",
                metric_name=title,
                metric_value=round(evaluation[key], 2),
            )
            for key, title in METRICS.items()
        ]
    return ModelCardData(
        model_name=name,
        license=licence or "other",
        library_name=LIBRARIES.get(target, "distill-video"),
        pipeline_tag="video-classification" if description.num_classes else "feature-extraction",
        tags=["video", "knowledge-distillation", "distill-video", target],
        base_model=next((link[1] for link in links if link), None),
        eval_results=results,
    )


def teachers(chain: Sequence[schema.Recipe]) -> Iterator[tuple[str, str]]:
    """What each teacher of the chain is, and where its weights are from."""
    for recipe in chain:
        if isinstance(recipe.objective, schema.Distill):
            for teacher in recipe.objective.teachers.values():
                name = teacher.model if teacher.kind == "timm" else size_name(teacher.size)
                weights = teacher.weights
                text = f"{teacher.kind} {name}"
                if weights is None:
                    yield f"{text}, random", ""
                else:
                    digest = f", sha256 {weights.sha256}" if weights.sha256 else ""
                    yield f"{text} ({Path(weights.checkpoint).name}{digest})", weights.source or ""


def size_name(size: str | schema.Size | None) -> str:
    """A size for people to read."""
    if isinstance(size, schema.Size):
        return f"{size.width} wide and {size.depth} deep"
    return str(size)


def architecture(description: Description) -> str:
    """Which model it is, in a few words."""
    settings = description.model
    if "timm" in settings:
        return f"timm's {settings['timm']}, frame by frame"
    size = settings["size"]
    name = size if isinstance(size, str) else size_name(schema.Size(**size))
    tubelet = f", tubelets of {settings['tubelet']} frames" if settings["tubelet"] != 1 else ""
    probe = f", probe {settings['probe']}" if "probe" in settings else ""
    return f"InternVideo2's video transformer, {name}{tubelet}{probe}"


def opening(description: Description, chain: Sequence[schema.Recipe]) -> str:
    views = description.views
    kind = (
        f"A classifier of videos into {description.num_classes} classes"
        if description.num_classes
        else "A distilled video backbone that makes a vector of a clip"
    )
    told = [text for text, _ in teachers(chain)]
    taught = f" Distilled from {' and '.join(told)}." if told else ""
    return (
        f"# {description.recipe}\n\n{kind}: {architecture(description)}, {views.frames} frames of "
        f"{views.image_size} pixels.{taught} Made with distill, a toolkit for knowledge "
        "distillation of video models."
    )


def usage(description: Description, target: str) -> str:
    output = "logits" if description.num_classes else "features"
    use = (
        'model.predict("video.mp4")  # the likeliest classes'
        if description.num_classes
        else 'model.features("video.mp4")'
    )
    folder = f"PATH/{target}"
    return f"```python\n{LOAD[target].format(folder=folder, output=output, use=use)}\n```"


def input_lines(description: Description) -> Iterator[str]:
    views = description.views
    resize = "bilinear, " + ("antialiased" if views.antialias else "not antialiased")
    yield (
        f"`clip` is float32 [B,3,{views.frames},{views.image_size},{views.image_size}]: RGB, "
        f"(pixel / 255 - mean) / std. config.json has mean, std and all that follows under "
        "`preprocessing`."
    )
    sampling = views.sampling
    stride = f" {sampling.stride_frames} apart" if sampling.kind == "dense" else ""
    yield (
        f"- frames: {views.frames}{stride}, {sampling.kind} sampling\n"
        f"- the shorter side is resized to {views.image_size} pixels ({resize}), then cut to a "
        f"square\n"
        f"- evaluated on {description.clips} clips x {description.crops} crops of a video, "
        "probabilities averaged"
    )
    if description.class_names:
        yield "Class names are in config.json under `label_names`, in the order of the logits."


def training_lines(chain: Sequence[schema.Recipe]) -> Iterator[str]:
    if not chain:
        yield "Not known: no recipe lies beside the weights."
    for number, recipe in enumerate(reversed(chain), 1):
        optim, listed = recipe.optim, recipe.data.train.list
        what = f"{number}. **{recipe.name}**: "
        if isinstance(recipe.objective, schema.Distill):
            told = " and ".join(text for text, _ in teachers([recipe]))
            what += f"distilled without labels from {told}"
        else:
            tuned = "finetuned" if recipe.model.weights else "trained from scratch"
            parts = {"all": tuned, "pool": "attentive probe", "head": "linear probe"}
            what += f"{parts[recipe.objective.trainable]}, {recipe.objective.num_classes} classes"
        if not optim.epochs:
            yield f"{what}; evaluated as it was"
            continue
        start = recipe.model.weights
        begun = f", from {Path(start.checkpoint).name}" if start and number == 1 else ""
        data = f"{Path(listed).name}" if listed else "a view cache"
        share = recipe.data.train.share
        part = f" ({share:.0%} of it)" if share < 1 else ""
        yield (
            f"{what}{begun}; data {data}{part}, {optim.epochs} epochs of batches of "
            f"{optim.batch_size}, AdamW at {optim.lr:g}, {optim.precision}"
        )


def results(evaluation: Mapping[str, Any] | None, description: Description) -> str:
    if evaluation is None:
        if description.num_classes:
            return "Not evaluated: `distill evaluate` writes numbers that an export takes along."
        return "Not evaluated: a distilled backbone has no classes; finetune or probe it."
    run, intervals = evaluation["manifest"]["run"], evaluation["confidence_intervals"]
    lines = [
        f"On {run['split']}, {Path(run['list']).name}: {evaluation['num_clips']:,} clips, "
        f"{evaluation['clips']} x {evaluation['crops']} views of each, "
        f"{evaluation['num_missing']:,} unreadable (counted as wrong).",
        "",
        f"| | % | {intervals['confidence']:.0%} interval |",
        "|---|---|---|",
    ]
    for key, title in METRICS.items():
        low, high = intervals[key]
        lines.append(f"| {title} | {evaluation[key]:.2f} | {low:.2f} to {high:.2f} |")
    return "\n".join(lines)


def licence_lines(licence: str | None, chain: Sequence[schema.Recipe]) -> str:
    sources = list(dict.fromkeys(source for _, source in teachers(chain) if source))
    own = (
        f"Weights: {licence}."
        if licence
        else "The weights' licence has not been said (`distill export --licence NAME`): it is for "
        "whoever publishes them to choose."
    )
    bound = " What they were made from binds too: the terms of the videos"
    if any(teachers(chain)):
        bound += " and of the teacher"
    return own + bound + (f" ({'; '.join(sources)})." if sources else ".")
