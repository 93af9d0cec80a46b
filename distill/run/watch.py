"""How far a student has come, token by token, on a few clips that stay the same for a whole run.

They are the first ones of the order of epoch 0, in the view that epoch sees: clips that are
trained on, so what is seen is the fit and not how it carries over. A look takes a forward pass
without drop path at the end of every epoch, and changes nothing of the run.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from distill.checkpoint import write_json
from distill.engines.plain import autocast, to_device
from distill.job import WATCHED_CLIPS, Job
from distill.kernels.coded_targets import CodedTargets, decode_targets_reference
from distill.log import RunLog
from distill.mask import token_grid
from distill.objective import same_rows
from distill.recipe import MAIN, Recipe, of_teacher
from distill.run import pictures
from distill.students.vit import PATCH

SHOWN_CLIPS = 4  # of those watched, in pictures
QUANTILES = (0.05, 0.5, 0.95)
BINS = 40  # of a histogram of cosines, from -1 to 1
FOLDER, FILE = "watched", "watched.json"
ROWS = {
    "seen": "what the student sees",
    "attention": "the teacher's attention",
    "teacher": "the teacher's last layer",
    "student": "the student's answer to it",
    "agreement": "their cosine",
}


@dataclass(frozen=True)
class Look:
    """What a look finds: cosines float32 [B,M] by the names of losses, `layer_00` upwards.

    `batch` is what was looked at, and `teacher` and `student` the last layer's rows [B,M,E] of
    the main teacher, float32 on the CPU.
    """

    cosines: dict[str, Tensor]
    batch: dict
    teacher: Tensor
    student: Tensor


class Watch:
    """Looks at a distillation's watched clips, and writes down what it sees."""

    def __init__(
        self,
        job: Job,
        recipe: Recipe,
        folder: Path,
        *,
        device: torch.device,
    ) -> None:
        self.job, self.folder, self.device = job, folder / FOLDER, device
        self.grid, self.precision = token_grid(recipe.data.views), recipe.optim.precision
        self._batch: dict | None = None

    @torch.no_grad()
    def look(self, student: nn.Module) -> Look:
        """Cosines of every watched token, as the student's weights are now."""
        if self._batch is None:
            with closing(self.job.watched.epoch(0)) as batches:
                self._batch = _copy(next(batches))
        was_training = student.training
        student.eval()
        try:
            batch = self.job.prepare(to_device(self._batch, self.device))
            with autocast(self.device, self.precision):
                found = list(layer_pairs(student, batch))
        finally:
            student.train(was_training)
        cosines = {
            name: F.cosine_similarity(ours, theirs, dim=-1).cpu() for name, ours, theirs in found
        }
        main = [pair for name, *pair in found if name.startswith("layer_")]
        ours, theirs = (rows.cpu() for rows in main[-1])
        return Look(cosines, batch, theirs, ours)

    def write(self, student: nn.Module, log: RunLog, *, step: int, epoch: int) -> None:
        """Look, and write statistics to the metrics, histograms and pictures to TensorBoard.

        The latest pictures and histograms go to the run's folder too, for its report.
        """
        look = self.look(student)
        log.write(step, {"epoch": epoch, **statistics(look.cosines)})
        for name, values in look.cosines.items():
            log.histogram(f"watched/{name}", values.numpy(), step)
        names = self.job.clip_names(look.batch["clip_id"].tolist())
        rows = clip_rows(look, self.grid)
        for number, own in enumerate(rows):
            log.picture(f"watched/clip_{number}", pictures.stack(list(own.values())), step)
        self.folder.mkdir(exist_ok=True)
        for number, own in enumerate(rows):
            for row, pixels in own.items():
                path = self.folder / f"{number}-{row}.png"
                partial = path.with_name(f".{path.name}.tmp")
                partial.write_bytes(pictures.png(pixels))
                os.replace(partial, path)
        edges = np.linspace(-1, 1, BINS + 1)
        write_json(
            self.folder / FILE,
            {
                "step": step,
                "epoch": epoch,
                "clips": clip_means(look.cosines, names),
                "rows": list(rows[0]),
                "edges": edges.tolist(),
                "counts": {
                    name: np.histogram(values.numpy(), edges)[0].tolist()
                    for name, values in look.cosines.items()
                },
            },
        )


def layer_pairs(student: nn.Module, batch: dict) -> Iterator[tuple[str, Tensor, Tensor]]:
    """A layer's name, and the student's rows and the teacher's, float32 [B,M,E]; of all teachers.

    Names and rows are those of the losses of a `DistillObjective`.
    """
    seen = {name: batch[name] for name in ("patches",) if name in batch}
    if not seen:
        seen = {"clip": batch["pixels"]}
    states, _, others = student.decoder_inputs(tokens=batch["tokens"], **seen)
    states, targets = same_rows(states, batch["middle"])
    teachers = {MAIN: (student.clip_decoder, states, targets)}
    for name, own in others.items():
        middle = batch[of_teacher("middle", name)]
        teachers[name] = student.get_submodule(f"{name}_decoder"), own, middle
    for name, (decoders, own, middle) in teachers.items():
        if isinstance(middle, CodedTargets):
            rows = decode_targets_reference(middle, torch.float32)
            middle = rearrange(rows, "b k m e -> k b m e")
        prefix = f"{name}_" if name else ""
        for layer, (decode, state) in enumerate(zip(decoders, own, strict=True)):
            yield f"{prefix}layer_{layer:02d}", decode(state).float(), middle[layer].float()


def layer_cosines(losses: Mapping[str, float]) -> dict[str, float]:
    """A step's mean cosine of every layer, which its loss 2 - 2 <z, t> tells.

    For codes, whose length is not exactly 1, it is <z, t>: the cosine on average.
    """
    return {f"cosine/{name}": 1 - loss / 2 for name, loss in losses.items() if "layer_" in name}


def statistics(cosines: dict[str, Tensor]) -> dict[str, float]:
    """Mean, standard deviation and quantiles of every layer's cosines over tokens."""
    found = {}
    for name, values in cosines.items():
        flat = values.double().flatten()
        points = torch.quantile(flat, torch.tensor(QUANTILES, dtype=flat.dtype))
        named = {"mean": flat.mean(), "std": flat.std(unbiased=False)}
        named |= {
            f"p{100 * share:02.0f}": point for share, point in zip(QUANTILES, points, strict=True)
        }
        found |= {f"watched/{name}_{key}": float(value) for key, value in named.items()}
    return found


def clip_means(cosines: dict[str, Tensor], names: list[str]) -> list[dict]:
    """Each clip's name and its mean cosine over all layers and tokens."""
    means = torch.stack([values.mean(dim=1) for values in cosines.values()]).mean(dim=0)
    pairs = zip(names, means.tolist(), strict=True)
    return [{"name": name, "cosine": cosine} for name, cosine in pairs]


def clip_rows(look: Look, grid: tuple[int, int, int]) -> list[dict[str, np.ndarray]]:
    """Strips of the first clips, one for each of `ROWS` that there is something to show of."""
    tokens = look.batch["tokens"].cpu().numpy()
    count = tokens.shape[1]
    # Without the class token's row, where there is one.
    theirs, ours = (rows[:, -count:].numpy() for rows in (look.teacher, look.student))
    cosine = [values for name, values in look.cosines.items() if name.startswith("layer_")][-1]
    agreement = pictures.heat(cosine[:, -count:].numpy(), low=0.0, high=1.0)
    palette = pictures.Palette.of(rearrange(theirs, "b m e -> (b m) e"))
    attention = look.batch.get("attention")
    found = []
    for clip in range(min(SHOWN_CLIPS, len(tokens))):
        own = {"seen": _frames(look.batch, grid, clip)}
        if attention is not None:
            weights = attention[clip].float().cpu().numpy().reshape(grid)
            high = float(np.percentile(weights, 99))
            own["attention"] = pictures.heat(weights, low=0.0, high=high)
        for name, colours in (
            ("teacher", palette.colours(theirs[clip])),
            ("student", palette.colours(ours[clip])),
            ("agreement", agreement[clip]),
        ):
            own[name] = pictures.token_map(grid, tokens=tokens[clip], colours=colours)
        side = pictures.strip(own["seen"]).shape[0]
        found.append({name: pictures.strip(frames, side=side) for name, frames in own.items()})
    return found


def show_inputs(log: RunLog, batch: dict) -> None:
    """Show the first clips of a batch with pixels [B,3,T,S,S] in TensorBoard, as they were read."""
    if "pixels" in batch:
        clips = batch["pixels"][:WATCHED_CLIPS].cpu().numpy()
        strips = [pictures.strip(rearrange(clip, "c t h w -> t h w c")) for clip in clips]
        log.picture("inputs/clips", pictures.stack(strips), 0)


def _frames(batch: dict, grid: tuple[int, int, int], clip: int) -> np.ndarray:
    seen = batch["tokens"][clip].cpu().numpy()
    if "patches" in batch:
        kept, patches = seen, batch["patches"][clip].cpu().numpy()
        patches = rearrange(patches, "n (c p q) -> n p q c", p=PATCH, q=PATCH)
    else:
        kept, pixels = np.arange(np.prod(grid)), batch["pixels"][clip].cpu().numpy()
        patches = rearrange(pixels, "c t (h p) (w q) -> (t h w) p q c", p=PATCH, q=PATCH)
    return pictures.draw_patches(grid, kept=kept, patches=patches, seen=seen)


def _copy(batch: dict) -> dict:
    """In memory of its own: a cache's batches use theirs again."""
    return {
        name: value.clone() if isinstance(value, Tensor) else value for name, value in batch.items()
    }
