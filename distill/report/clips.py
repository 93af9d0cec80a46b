"""Clips of an evaluation that tell most: confident mistakes and hard ones, as filmstrips."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from einops import rearrange

from distill.data.index import Clip, read_list
from distill.data.load import load_eval_view
from distill.errors import InputError
from distill.evaluation.metrics import Answers
from distill.evaluation.scores import Evaluation, clip_title
from distill.recipe import Recipe
from distill.run.pictures import data_uri, strip

SHOWN_CLIPS = 8  # of each sort
FRAMES = 8  # of a filmstrip, at most
SIDE = 112  # pixels of a frame


@dataclass(frozen=True)
class ShownClip:
    """A clip and what the model said of it; `image` is a data URI, or `why` there is none."""

    name: str
    label: str
    answer: str
    answer_share: float  # the model's probability for its answer, and for the label
    label_share: float
    image: str | None
    why: str


def mistakes(answers: Answers) -> np.ndarray:
    """Rows of clips that are taken for another class, the surest first."""
    wrong = answers.is_read & ~answers.hits[:, 0]
    order = np.argsort(-answers.scores.max(axis=1), kind="stable")
    return order[wrong[order]][:SHOWN_CLIPS]


def hardest(answers: Answers, *, but: Sequence[int] = ()) -> np.ndarray:
    """Rows of clips whose own class has the lowest score, of those that are read."""
    own = np.where(answers.is_right, answers.scores, -np.inf).max(axis=1)
    order = np.argsort(own, kind="stable")
    left = answers.is_read & ~np.isin(np.arange(len(own)), but)
    return order[left[order]][:SHOWN_CLIPS]


def show(
    rows: Sequence[int],
    evaluation: Evaluation,
    answers: Answers,
    *,
    recipe: Recipe | None,
    listed: dict[int, Clip],
    names: Sequence[str],
) -> list[ShownClip]:
    """Clips at these rows, decoded where the recipe's list says that they lie."""
    found = []
    for row in rows:
        clip = evaluation.clips[row]
        image, why = None, "its video is not in a list that is there"
        if recipe is not None and clip.id in listed:
            try:
                image, why = filmstrip(listed[clip.id], recipe), ""
            except InputError as error:
                why = str(error)
        answer = int(answers.best[row, 0])
        found.append(
            ShownClip(
                name=clip_title(clip),
                label=names[clip.label],
                answer=names[answer],
                answer_share=float(answers.scores[row, answer]),
                label_share=float(answers.scores[row, clip.label]),
                image=image,
                why=why,
            )
        )
    return found


def filmstrip(clip: Clip, recipe: Recipe) -> str:
    """The middle of a clip's frames as an evaluation samples them; raises InputError."""
    views = recipe.data.views
    views = views.model_copy(update={"frames": min(views.frames, FRAMES), "image_size": SIDE})
    view = load_eval_view(clip, clip_index=0, num_clips=1, crop_index=0, num_crops=1, views=views)
    return data_uri(strip(rearrange(view.pixels, "c t h w -> t h w c"), side=SIDE))


def listed_clips(recipe: Recipe | None, split: str, notes: list[str]) -> dict[int, Clip]:
    """Clips of a recipe's list by id; none, and a note that says why, where it is not there."""
    section = getattr(recipe.data, split, None) if recipe else None
    if section is None:
        return {}
    try:
        return {clip.id: clip for clip in read_list(section, seed=recipe.run.seed)}
    except InputError as error:
        notes.append(f"No filmstrips: {error}")
        return {}
