"""How good a distillation's student is between epochs, which learns the same untold.

Two signals. Labels it has never seen: a clip's class by the nearest neighbours of the student's
pooled vector, and by a linear probe on it. And its loss on clips of `data.val` against what the
teacher itself says of them, where training may read codes of that and of other clips.
"""

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill.cache.calibrate import sample_clips
from distill.cache.live import check_teacher_hash, view_loader
from distill.checkpoint import random_state, restore_random_state
from distill.data.index import Clip, check_videos, read_list
from distill.data.load import Task, collate
from distill.dist import joined_part
from distill.engines.plain import autocast, to_device
from distill.errors import InputError, StateError
from distill.evaluation.evaluate import Unreadable, score_views, share_of_all
from distill.job import live_targets
from distill.models import teacher_place
from distill.objective import DistillObjective
from distill.recipe import Distill, Recipe
from distill.students.student import DistillStudent
from distill.targets import LiveTargets

SAMPLE_SEED = 0  # the same clips whatever a run's seed, so that runs compare
EXACT_BATCH = 8  # clips in a forward of the teacher, and of the student against it
TEMPERATURE = 0.07  # of neighbours' votes: Wu et al. 2018, Instance Discrimination, section 3.4
PROBE_STEPS = 200  # of L-BFGS at most; a probe that is nearly fitted tells as much

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Monitor:
    """What a check looks at: clips with labels, and batches with the teacher's targets.

    `train` and `val` are both empty where a list has no labels, and `exact` is, on the CPU, of
    the first process alone, and empty without the teacher.
    """

    recipe: Recipe
    device: torch.device
    train: Sequence[Clip]
    val: Sequence[Clip]
    exact: Sequence[dict]

    def is_due(self, epoch: int, epochs: int) -> bool:
        """Whether to check at the end of `epoch`, counted from 0, of so many."""
        done = epoch + 1
        return done == epochs or done % self.recipe.objective.monitor.every_epochs == 0

    def check(
        self, objective: DistillObjective, *, on_batch: Callable[[], None] = lambda: None
    ) -> dict[str, float]:
        """At the first process knn_top1, linear_top1 (percent) and exact_loss; none elsewhere.

        Only those that there is something to tell from. Joined processes divide the labelled
        clips. `on_batch` is called between batches. Leaves the objective and all generators as
        they were. Raises StateError for a student whose pooled vectors are not finite.
        """
        found = {}
        with undisturbed(objective):
            if self.train:
                train, val = (
                    self._features(objective.student, clips, on_batch)
                    for clips in (self.train, self.val)
                )
                if train and val:
                    neighbors = self.recipe.objective.monitor.neighbors
                    found["knn_top1"] = knn_top1(*train, *val, neighbors=neighbors)
                    found["linear_top1"] = linear_top1(*train, *val)
                    on_batch()
            if self.exact:
                found["exact_loss"] = self._exact_loss(objective)
        return found

    def _features(
        self, student: DistillStudent, clips: Sequence[Clip], on_batch: Callable[[], None]
    ) -> tuple[Tensor, Tensor] | None:
        """At the first process pooled vectors [B,P] in float32 and labels [B] of what is read."""
        share = score_views(
            PooledVector(student).eval(),  # the mode in which it is left
            clips,
            data=self.recipe.data,
            num_classes=student.pooled_width,
            num_clips=1,
            num_crops=1,
            batch_size=self.recipe.evaluate.batch_size,
            precision=self.recipe.optim.precision,
            device=self.device,
            part=joined_part(),
            title="monitor",
            on_batch=on_batch,
        )
        try:
            share = share_of_all(share, clips)
        except StateError as error:  # none of the clips could be read
            logger.warning("monitor: %s", error)
            return None
        if share is None:
            return None
        labels = {clip.id: clip.label for clip in clips}
        ids = share.scores.clip_id.tolist()
        return share.scores.logits, torch.tensor([labels[clip_id] for clip_id in ids])

    @torch.no_grad()
    def _exact_loss(self, objective: DistillObjective) -> float:
        total, num_clips = 0.0, 0
        for batch in self.exact:
            with autocast(self.device, self.recipe.optim.precision):
                loss = objective(to_device(batch, self.device))["loss"]
            total += loss.item() * len(batch["clip_id"])
            num_clips += len(batch["clip_id"])
        return total / num_clips


class PooledVector(nn.Module):
    """A student as `score_views` takes a model: clips to pooled vectors, with no patch dropped."""

    def __init__(self, student: DistillStudent) -> None:
        super().__init__()
        self.student = student

    def forward(self, clip: Tensor) -> Tensor:
        """Pooled [B,P] of a clip uint8 [B,3,T,H,W]."""
        return self.student.decoder_inputs(clip).pooled


@contextmanager
def undisturbed(module: nn.Module) -> Iterator[None]:
    """The module in eval mode; it, and every generator, after the block as before."""
    was_training, state = module.training, random_state()
    module.eval()
    try:
        yield
    finally:
        module.train(was_training)
        restore_random_state(state)


def knn_top1(
    train: Tensor, train_labels: Tensor, val: Tensor, val_labels: Tensor, *, neighbors: int
) -> float:
    """Percent of vectors [V,P] whose class the nearest of [B,P] by cosine vote for.

    A vote weighs exp(cosine / TEMPERATURE), as in Wu et al. 2018.
    """
    cosine = F.normalize(val, dim=1) @ F.normalize(train, dim=1).T  # [V,B]
    near, places = cosine.topk(min(neighbors, len(train)), dim=1)
    # The nearest one has weight 1, for the sake of float32.
    weights = ((near - near[:, :1]) / TEMPERATURE).exp()
    votes = torch.zeros(len(val), int(train_labels.max()) + 1)
    votes.scatter_add_(1, train_labels[places], weights)
    return 100 * (votes.argmax(dim=1) == val_labels).float().mean().item()


def linear_top1(train: Tensor, train_labels: Tensor, val: Tensor, val_labels: Tensor) -> float:
    """Percent of vectors [V,P] that logistic regression fitted on [B,P] puts in their class.

    On vectors standardised by the mean and spread of those that it is fitted on.
    """
    from sklearn.exceptions import ConvergenceWarning  # not at the top: it takes a second
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    probe = make_pipeline(
        StandardScaler(), LogisticRegression(max_iter=PROBE_STEPS, random_state=0)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        probe.fit(train.numpy(), train_labels.numpy())
    return 100 * probe.score(val.numpy(), val_labels.numpy())


def describe(found: dict[str, float]) -> str:
    """What a check found, for a log."""
    form = {
        "knn_top1": "nearest neighbours' top-1 {:.2f} on val",
        "linear_top1": "linear probe's {:.2f}",
        "exact_loss": "loss {:.4f} against the teacher itself on val",
    }
    return ", ".join(form[name].format(value) for name, value in found.items())


def open_monitor(
    recipe: Recipe, prepare: Callable[[dict], dict], *, device: torch.device
) -> Monitor | None:
    """What the recipe's monitor looks at; None without one, or with nothing to look at.

    `prepare` is the run's, whose teacher is taken where it has one. What is left out is said,
    with the reason. Raises InputError for a list that cannot be read, or has no videos of `val`,
    and StateError for a teacher that is not the cache's.
    """
    if not isinstance(recipe.objective, Distill) or recipe.objective.monitor is None:
        return None
    if recipe.data.val is None or recipe.data.val.list is None:
        _say("tells nothing, for want of clips; set data.val.list=FILE")
        return None
    held_out = read_list(recipe.data.val, seed=recipe.run.seed)
    check_videos(held_out, recipe.data.val)
    train, val = _labelled(recipe, held_out)
    state = random_state()  # a GPU's is drawn from when a teacher is made ready
    exact = _exact_batches(recipe, prepare, held_out, device=device)
    restore_random_state(state)
    return Monitor(recipe, device, train, val, exact)


def _labelled(recipe: Recipe, held_out: Sequence[Clip]) -> tuple[Sequence[Clip], Sequence[Clip]]:
    """Some clips of `train` and of `val`, or none of either."""
    section = recipe.data.train
    try:
        if section.list is None:
            raise InputError("data.train.list is not set")
        listed = read_list(section, seed=recipe.run.seed)
        for name, clips in ((section.list, listed), (recipe.data.val.list, held_out)):
            if any(clip.label is None for clip in clips):
                raise InputError(f"{name} has clips without a label")
        check_videos(listed, section)  # which training from a cache does without
        count = recipe.objective.monitor.clips
        train, val = (
            sample_clips(clips, seed=SAMPLE_SEED, count=count) for clips in (listed, held_out)
        )
        if len({clip.label for clip in train}) < 2:
            raise InputError(f"{section.list} has a single class")
    except InputError as error:
        _say(f"goes without nearest neighbours and linear probe: {error}")
        return (), ()
    return train, val


def _exact_batches(
    recipe: Recipe,
    prepare: Callable[[dict], dict],
    held_out: Sequence[Clip],
    *,
    device: torch.device,
) -> list[dict]:
    """What the objective takes of some clips of `val`, with the teacher's own targets."""
    count = recipe.objective.monitor.exact_clips
    if not count or joined_part().index:
        return []
    live = prepare
    if not isinstance(live, LiveTargets):
        missing = _missing_teacher(recipe.objective)
        if missing:
            _say(f"goes without the loss against the teacher itself: {missing}")
            return []
        check_teacher_hash(recipe)
        live = live_targets(recipe, device=device)
    tasks = [Task(clip) for clip in sample_clips(held_out, seed=SAMPLE_SEED, count=count)]
    pieces = [tasks[start : start + EXACT_BATCH] for start in range(0, len(tasks), EXACT_BATCH)]
    unreadable, found = Unreadable(), []
    with closing(view_loader(recipe, unreadable).run(pieces)) as batches:
        for items in batches:
            if items:
                batch = live({**to_device(collate(items), device), "epoch": 0})
                found.append(to_device(batch, torch.device("cpu")))
    if not found:
        why = next(iter(unreadable.reasons.values()))
        _say(f"goes without the loss against the teacher itself: no clip can be read, e.g. {why}")
    return found


def _missing_teacher(section: Distill) -> str | None:
    """Why a teacher cannot be asked here; None if all can."""
    for name, teacher in section.teachers.items():
        weights, place = teacher.weights, teacher_place(name)
        if weights is None and not teacher.random:
            return f"{place}.weights is not set"
        if weights is not None and not Path(weights.checkpoint).exists():
            return f"{weights.checkpoint}: no such file; set {place}.weights.checkpoint"
    return None


def _say(text: str) -> None:
    if joined_part().index == 0:
        logger.info("monitor: %s", text)
