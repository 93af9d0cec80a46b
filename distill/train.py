"""The training loop: distilling, finetuning, probing and training from scratch are one loop.

What differs is the job: where batches come from, what prepares them, and the objective.
"""

import fcntl
import json
import logging
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from distill import log
from distill import recipe as schema
from distill.checkpoint import (
    Checkpoint,
    latest_checkpoint,
    load_checkpoint,
    prune_checkpoints,
    random_state,
    remove_partial,
    restore_random_state,
    save_checkpoint,
    step_folder,
    write_json,
    write_tensors,
    write_text,
)
from distill.engine import Engine, NonFiniteError, pick_device, reproducible
from distill.errors import StateError
from distill.evaluate import evaluate
from distill.interrupt import Interrupted, StopRequest
from distill.job import Job, build_job, check_evaluation, describe_model, has_evaluation
from distill.optim import make_schedule
from distill.recipe_file import differences, dump_recipe, load_recipe

SUMMARY = "summary.json"
RECIPE = "recipe.yaml"
SHOWN_CLIPS = 4  # of a step's clips in a message; all of them go to a file

logger = logging.getLogger(__name__)


@dataclass
class Position:
    """Where a run stands: steps done in all and in this epoch, the last and the best values."""

    epoch: int = 0
    step_in_epoch: int = 0
    step: int = 0
    seconds: float = 0.0
    last: dict[str, float] = field(default_factory=dict)
    best: dict[str, float] = field(default_factory=dict)


def train(recipe: schema.Recipe, folder: str | Path) -> dict:
    """Train as the recipe says, in `folder`, and return what its summary.json holds.

    Goes on where an earlier call in the same folder stopped, and ends with the same weights, bit
    for bit on a CPU; a finished run only returns its summary. With `optim.epochs` 0 the weights
    are evaluated as they are. SIGINT and SIGTERM save after the step at hand and raise
    `Interrupted`. Raises InputError for what is wrong with the inputs and StateError for a folder
    of another recipe, a damaged checkpoint, or a loss that is not finite.
    """
    folder = Path(folder)
    with claim_folder(folder, recipe):
        if (folder / SUMMARY).exists():
            return json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
        device = pick_device()
        with reproducible(device, seed=recipe.run.seed):
            check_evaluation(recipe)
            job = build_job(recipe, folder, device=device)
            with StopRequest() as stop:
                at = Position()
                if job.batches is not None:
                    at = Run(recipe, job, folder, device=device, stop=stop).train()
                return finish(recipe, job, folder, at, device=device, stop=stop)


class Run:
    """The loop and its state, from the latest checkpoint in `folder` or from the start."""

    def __init__(
        self,
        recipe: schema.Recipe,
        job: Job,
        folder: Path,
        *,
        device: torch.device,
        stop: StopRequest,
    ) -> None:
        self.recipe, self.job, self.folder = recipe, job, folder
        self.device, self.stop = device, stop
        self.checkpoints = folder / "checkpoints"
        self.schedule = make_schedule(recipe.optim, steps_per_epoch=job.batches.steps_per_epoch)
        self.engine = Engine(
            job.objective, job.model, optim=recipe.optim, prepare=job.prepare, device=device
        )
        self.at = self.resume()
        self.meter = log.Meter(job.batches.wait_seconds)
        self.saved_at = time.monotonic()

    def resume(self) -> Position:
        """Take everything back from the latest checkpoint, where there is one."""
        remove_partial(self.checkpoints)
        latest = latest_checkpoint(self.checkpoints)
        if latest is None:
            return Position()
        saved = load_checkpoint(latest)
        self.engine.load(saved.weights, saved.optimizer, saved.state["scaler"])
        restore_random_state(saved.state["random"])
        at = Position(**saved.state["position"])
        logger.info("%s: goes on after step %d", self.folder, at.step)
        return at

    def train(self) -> Position:
        """Run to the last step, and save it; on an interruption save and raise it."""
        with (
            closing(log.RunLog(self.folder, step=self.at.step)) as self.log,
            log.progress(
                f"train {self.recipe.name}",
                total=self.schedule.num_steps,
                unit="steps",
                done=self.at.step,
            ) as self.bar,
        ):
            try:
                while self.at.epoch < self.recipe.optim.epochs:
                    self.train_epoch()
                    self.end_epoch()
            except Interrupted:
                self.save()
                logger.info(
                    "%s: saved after step %d, goes on from there", self.folder, self.at.step
                )
                raise
            except NonFiniteError as error:
                raise describe_non_finite(error, self.job, self.folder) from None
        return self.at

    def train_epoch(self) -> None:
        """The steps of the epoch that are left."""
        at, run = self.at, self.recipe.run
        if at.step_in_epoch == self.job.batches.steps_per_epoch:
            return  # stopped between the last step and the evaluation
        self.job.objective.train()
        with closing(self.job.batches.epoch(at.epoch, at.step_in_epoch)) as batches:
            for batch in batches:
                lr = self.schedule.lr_at(at.step)
                losses = self.engine.step(batch, step=at.step + 1, lr=lr)
                at.step += 1
                at.step_in_epoch += 1
                self.bar.advance()
                self.meter.clips += len(batch["clip_id"])
                if at.step % run.log_steps == 0 or at.step == self.schedule.num_steps:
                    self.log_step(losses, lr=lr)
                if time.monotonic() - self.saved_at > 60 * run.save_minutes:
                    self.save()
                self.stop.check()

    def log_step(self, losses: dict[str, torch.Tensor], *, lr: float) -> None:
        """Write the step's values; the one place that waits for the device."""
        self.engine.check()
        at = self.at
        at.last = {name: value.item() for name, value in losses.items()}
        rates = self.meter.read(self.job.batches.wait_seconds)
        self.log.write(at.step, {"epoch": at.epoch, "lr": lr, **at.last, **rates})
        self.bar.note(
            f"loss {at.last['loss']:.4f}  {rates['clips_per_second']:.1f} clips/s  "
            f"data wait {rates['data_wait']:.0%}"
        )

    def end_epoch(self) -> None:
        """Check the epoch on `val` where that is due, and keep the weights if they are the best."""
        at, every = self.at, self.recipe.evaluate.every_epochs
        is_best = False
        is_classifier = isinstance(self.recipe.objective, schema.Classify)
        if is_classifier and self.recipe.data.val and every and (at.epoch + 1) % every == 0:
            result = evaluate(
                self.job.model,
                self.recipe,
                split="val",
                num_clips=1,
                num_crops=1,
                device=self.device,
                on_batch=self.stop.check,
            )
            scores = {f"val/{name}": result[name] for name in ("top1", "top5")}
            self.log.write(at.step, {"epoch": at.epoch, **scores})
            logger.info(
                "epoch %d: top-1 %.2f, top-5 %.2f on val", at.epoch, result["top1"], result["top5"]
            )
            is_best = not at.best or result["top1"] > at.best["top1"]
            if is_best:
                at.best = {"top1": result["top1"], "epoch": at.epoch, "step": at.step}
        at.epoch, at.step_in_epoch = at.epoch + 1, 0
        if is_best or at.epoch == self.recipe.optim.epochs:
            self.save()
        # Evaluating and saving do not count as time of the next steps.
        self.meter.read(self.job.batches.wait_seconds)

    def save(self) -> None:
        """Write a checkpoint that this run, or a rerun of it, goes on from."""
        self.engine.check()  # a GPU may not have told yet that a step went wrong
        at, now = self.at, time.monotonic()
        at.seconds += now - self.saved_at
        self.saved_at = now
        state = {
            "step": at.step,
            "position": asdict(at),
            "scaler": self.engine.scaler_state(),
            "random": random_state(),
        }
        whole = Checkpoint(self.engine.weights(), self.engine.optimizer_state(), state)
        save_checkpoint(self.checkpoints, whole, metadata=describe_model(self.recipe))
        prune_checkpoints(
            self.checkpoints,
            keep=self.recipe.run.keep_checkpoints,
            best_step=at.best["step"] if at.best else None,
        )


def finish(
    recipe: schema.Recipe,
    job: Job,
    folder: Path,
    at: Position,
    *,
    device: torch.device,
    stop: StopRequest,
) -> dict:
    """Write the final weights, evaluate a classifier with all its views, write the summary."""
    write_tensors(
        folder / "model.safetensors", job.model.state_dict(), metadata=describe_model(recipe)
    )
    summary = {
        "name": recipe.name,
        "objective": recipe.objective.kind,
        "parameters": sum(parameter.numel() for parameter in job.model.parameters()),
        "epochs": recipe.optim.epochs,
        "steps": at.step,
        "train_seconds": at.seconds,
        "last": at.last,
        "best_on_val": at.best,
        "quarantined": len(job.quarantine.entries) if job.quarantine else 0,
        "evaluation": None,
        "weights": str(folder / "model.safetensors"),
        "device": str(device),
    }
    if at.best:
        best = step_folder(folder / "checkpoints", int(at.best["step"]))
        summary["best_on_val"] = {**at.best, "weights": str(best / "model.safetensors")}
    if job.quarantine and job.quarantine.entries:
        logger.warning(
            "%s: went on without %d clips that could not be read; %s says why",
            folder,
            len(job.quarantine.entries),
            folder / "quarantine.jsonl",
        )
    if isinstance(recipe.objective, schema.Classify) and has_evaluation(recipe):
        section = recipe.evaluate
        result = evaluate(
            job.model.to(device),
            recipe,
            split=section.split,
            num_clips=section.clips,
            num_crops=section.crops,
            device=device,
            folder=folder,
            on_batch=stop.check,
        )
        lists = ("missing", "incomplete")  # which can be long, and stand in evaluation.json
        summary["evaluation"] = {key: result[key] for key in result if key not in lists}
    write_json(folder / SUMMARY, summary)
    return summary


def describe_non_finite(error: NonFiniteError, job: Job, folder: Path) -> StateError:
    """The message with the clips' names; all of them are written to non_finite.json."""
    names = job.clip_names(error.clip_ids)
    path = folder / "non_finite.json"
    write_json(path, {"step": error.step, "clips": names})
    shown = ", ".join(names[:SHOWN_CLIPS])
    more = f" and {len(names) - SHOWN_CLIPS} more ({path})" if len(names) > SHOWN_CLIPS else ""
    return StateError(
        f"{folder}: {error}; clips: {shown}{more}; look at them, or lower optim.lr or set "
        "optim.clip_grad"
    )


@contextmanager
def claim_folder(folder: Path, recipe: schema.Recipe) -> Iterator[None]:
    """Hold the run folder for this process and this recipe, written to its recipe.yaml.

    Raises StateError when another process trains there, or when what lies there came from other
    settings that have a say in the result.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StateError(
                f"{folder}: another process is training there; wait for it or set run.folder"
            ) from None
        path = folder / RECIPE
        has_begun = (folder / SUMMARY).exists() or latest_checkpoint(folder / "checkpoints")
        if has_begun and path.exists():
            changed = differences(load_recipe(path), recipe)
            if changed:
                raise StateError(
                    f"{folder}: was started with other settings ({'; '.join(changed)}); put them "
                    "back, or set run.folder to start another run"
                )
        write_text(path, dump_recipe(recipe))
        yield
