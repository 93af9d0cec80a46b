"""The training loop: distilling, finetuning, probing and training from scratch are one loop.

What differs is the job: where batches come from, what prepares them, and the objective. Students
that learn together are several jobs, to which the loop hands the same batches. Processes that
have joined each run the loop on their share of every batch; the first one does all the writing.
"""

import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict
from pathlib import Path

import torch

from distill import log
from distill import recipe as schema
from distill.cache.read import CachedBatches
from distill.checkpoint import (
    Checkpoint,
    load_latest,
    prune_checkpoints,
    random_state,
    remove_partial,
    restore_random_state,
    save_checkpoint,
    write_json,
)
from distill.data.load import ClipBatches
from distill.dist import exchange, joined_part, wait_for_all
from distill.engines import make_engine
from distill.engines.overlap import overlapped
from distill.engines.plain import (
    NonFiniteError,
    pick_device,
    reproducible,
    seed_generators,
    split_batch,
)
from distill.errors import StateError
from distill.evaluation.evaluate import evaluate, score_views
from distill.evaluation.probe_scores import evaluate_settings
from distill.job import (
    Job,
    build_job,
    check_evaluation,
    open_cache,
)
from distill.kernel_choice import using_kernels
from distill.objective import compile_losses
from distill.probe import make_schedules, update_records
from distill.run.finish import Position, finish
from distill.run.folder import SUMMARY, claim_folder
from distill.run.interrupt import Interrupted, StopRequest
from distill.run.meter import Meter, note
from distill.run.monitor import Monitor, describe, open_monitor
from distill.run.provenance import changed_settings, note_provenance
from distill.run.watch import Watch, layer_cosines, show_inputs
from distill.run.watchdog import Watchdog
from distill.run.writer import Writer
from distill.use.describe import describe_model

SHOWN_CLIPS = 4  # of a step's clips in a message; all of them go to a file

logger = logging.getLogger(__name__)


def train(recipe: schema.Recipe, folder: str | Path) -> dict:
    """Train as the recipe says, in `folder`, and return what its summary.json holds.

    Goes on where an earlier call in the same folder stopped, and ends with the same weights, bit
    for bit on a CPU; a finished run only returns its summary. With `optim.epochs` 0 the weights
    are evaluated as they are. SIGINT, SIGTERM and SIGUSR1 save after the step at hand and raise
    `Interrupted`. Raises InputError for what is wrong with the inputs and StateError for a folder
    of another recipe, a damaged checkpoint, a full disk, or a loss that is not finite.
    """
    (summary,) = train_together([recipe], [Path(folder)])
    return summary


def train_together(recipes: Sequence[schema.Recipe], folders: Sequence[Path]) -> list[dict]:
    """As `train`, for recipes that share seed, list, views and cached targets: read once for all.

    Each ends with the weights of a run of its own, bit for bit on a CPU, and leaves the same
    files in its folder. Where a stop or a kill leaves them at different steps, the reading
    begins again at the earliest, and the others skip what they have had.
    """
    with ExitStack() as claims:
        for recipe, folder in zip(recipes, folders, strict=True):
            claims.enter_context(claim_folder(folder, recipe))
            claims.enter_context(log.kept_in(folder / joined_part().name("log.txt")))
        left = [
            (recipe, folder)
            for recipe, folder in zip(recipes, folders, strict=True)
            if not (folder / SUMMARY).exists()
        ]
        if left:
            train_unfinished(left)
        wait_for_all()  # for the summaries
        return [json.loads((folder / SUMMARY).read_text(encoding="utf-8")) for folder in folders]


def train_unfinished(left: Sequence[tuple[schema.Recipe, Path]]) -> None:
    """Open what the recipes read, train them in their folders and write their summaries."""
    device, seed = pick_device(), left[0][0].run.seed
    with using_kernels([one for one, _ in left], device), reproducible(device, seed=seed):
        cache = open_cache(left[0][0]) if len(left) > 1 else None
        jobs = []
        for recipe, folder in left:
            check_evaluation(recipe)
            seed_generators(seed)  # so that each starts with the weights of a run of its own
            jobs.append(build_job(recipe, folder, device=device, cache=cache))
            note_provenance(recipe, folder, device=device)
            compile_losses(jobs[-1].objective, recipe.run.compile, device)
        size = math.lcm(*(recipe.optim.batch_size for recipe, _ in left))
        stream = jobs[0].batches
        if cache is not None:
            stream = CachedBatches(cache, batch_size=size, seed=seed, part=joined_part())
        with StopRequest() as stop, Writer() as writer, ExitStack() as engines:
            # Of weights that are only evaluated:
            positions, models = [Position()], [{"": lambda: jobs[0].model}]
            if stream is not None:
                monitor = open_monitor(left[0][0], jobs[0].prepare, device=device)
                settings = {
                    "stream": stream,
                    "monitor": monitor,
                    "device": device,
                    "stop": stop,
                    "writer": writer,
                }
                runs = []
                for (recipe, folder), job in zip(left, jobs, strict=True):
                    runs.append(Run(recipe, job, folder, **settings))
                    engines.callback(runs[-1].engine.close)
                train_runs(runs, stream, size=size)
                writer.wait()
                wait_for_all()  # for the checkpoints
                positions, models = [run.at for run in runs], [run.models for run in runs]
            for (recipe, folder), job, at, found in zip(left, jobs, positions, models, strict=True):
                finish(recipe, job, folder, at, models=found, device=device, stop=stop)


def train_runs(runs: "Sequence[Run]", stream: ClipBatches | CachedBatches, *, size: int) -> None:
    """The loop: every run to its last step, and saved; on an interruption save and raise it.

    Batches of the stream have `size` clips: one batch of each run, or several whole ones.
    """
    with ExitStack() as stack:
        left = [run for run in runs if not run.is_done]
        stack.enter_context(stream.keeping_workers())
        for run in left:
            stack.enter_context(run.shown())
            stack.enter_context(run.watchdog)
        try:
            while left:
                epoch = min(run.at.epoch for run in left)
                train_epoch([run for run in left if run.at.epoch == epoch], stream, size=size)
                left = [run for run in left if not run.is_done]
        except Interrupted:
            for run in left:
                run.save()
                run.writer.wait()
                logger.info("%s: saved after step %d, goes on from there", run.folder, run.at.step)
            raise


def train_epoch(runs: "Sequence[Run]", stream: ClipBatches | CachedBatches, *, size: int) -> None:
    """What is left of an epoch that all the runs stand in."""
    # None is left for a run that stopped between the last step and the evaluation.
    reading = [run for run in runs if run.at.step_in_epoch < run.job.batches.steps_per_epoch]
    if reading:
        first = min(run.clips_seen for run in reading) // size
        for run in reading:
            run.job.objective.train()
        with closing(stream.epoch(runs[0].at.epoch, first)) as batches:
            for number, batch in enumerate(overlapped(batches, runs[0].device), first):
                for run in reading:
                    run.take(batch, start=number * size)
    for run in runs:
        run.end_epoch()


class Run:
    """A model's training and where it stands: at the latest checkpoint in `folder`, or the start.

    `stream` gives the batches, of which `job.batches` says how many the run itself would read.
    """

    def __init__(
        self,
        recipe: schema.Recipe,
        job: Job,
        folder: Path,
        *,
        stream: ClipBatches | CachedBatches,
        monitor: Monitor | None,
        device: torch.device,
        stop: StopRequest,
        writer: Writer,
    ) -> None:
        self.recipe, self.job, self.folder = recipe, job, folder
        self.stream, self.device, self.stop, self.writer = stream, device, stop, writer
        self.monitor = monitor
        self.checkpoints = folder / "checkpoints"
        self.sweep, steps = job.sweep, job.batches.steps_per_epoch
        settings = self.sweep.settings if self.sweep else ()
        self.schedules = make_schedules(recipe.optim, settings, steps_per_epoch=steps)
        self.num_steps = self.schedules[0].num_steps
        self.engine = make_engine(
            recipe.engine,
            job.objective,
            self.sweep.parts if self.sweep else job.model,
            optim=recipe.optim,
            prepare=job.prepare,
            device=device,
            groups=self.sweep and self.sweep.param_groups(recipe.optim),
        )
        self.is_first = joined_part().index == 0
        self.at = self.resume()
        self.meter = Meter(
            recipe, device=device, wait_seconds=stream.wait_seconds, num_ranks=joined_part().count
        )
        self.saved_at = time.monotonic()
        self.watchdog = Watchdog(folder, minutes=recipe.run.hang_minutes)
        self.watch = Watch(job, recipe, folder, device=device) if job.watched else None

    def resume(self) -> Position:
        """Take everything back from the latest checkpoint, where there is one."""
        if self.is_first:
            remove_partial(self.checkpoints)
        else:
            wait_for_all()  # the first one sets damaged checkpoints aside
        saved = load_latest(self.checkpoints, damaged=self.recipe.run.damaged_checkpoint)
        if self.is_first:
            wait_for_all()
        if saved is None:
            return Position()
        state = saved.state
        self.engine.load(saved.weights, saved.optimizer, state["scaler"], saved.ema)
        restore_random_state(state["random"])
        at = Position(**state["position"])
        logger.info("%s: goes on after step %d", self.folder, at.step)
        return at

    @property
    def is_done(self) -> bool:
        return self.at.epoch >= self.recipe.optim.epochs

    @property
    def models(self) -> dict[str, Callable[[], torch.nn.Module]]:
        """What is there to evaluate at the end: the model and, as `ema`, its averaged weights."""
        trained = (lambda: self.job.model) if self.sweep else self.engine.trained
        averages = {} if self.recipe.optim.ema is None else {"ema": self.engine.averaged}
        return {"": trained, **averages}

    @property
    def clips_seen(self) -> int:
        """Clips of this epoch's order that it has trained on."""
        return self.at.step_in_epoch * self.recipe.optim.batch_size

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Log its steps and show how far it is while the block runs."""
        if not self.is_first:
            self.log, self.bar = None, log.SilentBar()
            yield
            return
        with (
            closing(log.RunLog(self.folder, step=self.at.step, epoch=self.at.epoch)) as self.log,
            log.progress(
                f"train {self.recipe.name}",
                total=self.num_steps,
                unit="steps",
                done=self.at.step,
            ) as self.bar,
        ):
            self.log.settings(changed_settings(self.recipe))
            yield

    def take(self, batch: dict, *, start: int) -> None:
        """Train on what it has not seen of a batch whose first clip is number `start` of the order.

        Its own batches lie in the stream's one behind the other.
        """
        for piece in split_batch(batch, self.recipe.optim.batch_size):
            if start == self.clips_seen:
                with naming_clips(self.job, self.folder):
                    self.step(piece)
            start += self.recipe.optim.batch_size

    def step(self, batch: dict) -> None:
        """One optimiser step, and what is due after it."""
        at, run = self.at, self.recipe.run
        self.watchdog.begin(at.step + 1, batch["clip_id"], self.job.clip_names)
        lrs = [schedule.lr_at(at.step) for schedule in self.schedules]
        if self.is_first and not at.step and not self.watch:
            show_inputs(self.log, batch)
        own = 0 if batch.get("is_spare") else len(batch["clip_id"])
        counts = [clips for (clips,) in exchange(own)]
        batch["num_clips"], batch["most_clips"] = sum(counts), max(counts)
        losses = self.engine.step(batch, step=at.step + 1, lr=lrs if self.sweep else lrs[0])
        at.step += 1
        at.step_in_epoch += 1
        self.bar.advance()
        read, cached = 0, 0
        if "is_cached" in batch:
            read, cached = len(batch["is_cached"]), int(batch["is_cached"].sum())
        self.meter.count(batch["num_clips"], read=read, cached=cached)
        at.read, at.cached = at.read + read, at.cached + cached
        if at.step % run.log_steps == 0 or at.step == self.num_steps:
            self.log_step(losses, lr=max(lrs))
        told = exchange(self.stop.signum, time.monotonic() - self.saved_at > 60 * run.save_minutes)
        if told[0][1]:  # the first process's clock counts
            self.save()
        self.writer.check()
        self.stop.check(max(signum for signum, _ in told))

    def log_step(self, losses: dict[str, torch.Tensor], *, lr: float) -> None:
        """Write the step's values; the one place that waits for the device."""
        self.engine.check()
        at = self.at
        at.last = {name: value.item() for name, value in losses.items()}
        rates = self.meter.read(self.stream.wait_seconds, steps_left=self.num_steps - at.step)
        if self.is_first:
            cosines = layer_cosines(at.last) if self.watch else {}
            self.log.write(at.step, {"epoch": at.epoch, "lr": lr, **at.last, **cosines, **rates})
            self.bar.note(note(at.last["loss"], rates))

    def end_epoch(self) -> None:
        """Check the epoch on `val` where that is due, and keep the weights if they are the best."""
        at, every = self.at, self.recipe.evaluate.every_epochs
        is_best = False
        is_classifier = isinstance(self.recipe.objective, schema.Classify)
        if is_classifier and self.recipe.data.val and every and (at.epoch + 1) % every == 0:
            engine = self.engine
            if self.sweep:
                result = self.check_settings()
            else:
                result = self.check_on_val(engine.trained(), "")
            scores = {f"val/{name}": result[name] for name in ("top1", "top5")}
            if self.recipe.optim.ema is not None:
                averaged = self.check_on_val(engine.averaged(), " with averaged weights")
                scores |= {f"val/ema_{name}": averaged[name] for name in ("top1", "top5")}
            if self.is_first:
                self.log.write(at.step, {"epoch": at.epoch, **scores})
            is_best = not at.best or result["top1"] > at.best["top1"]
            if is_best:
                at.best = {"top1": result["top1"], "epoch": at.epoch, "step": at.step}
                if self.sweep:
                    at.best["setting"] = result["setting"]
        if self.watch:
            self.tell_quality()
        at.epoch, at.step_in_epoch = at.epoch + 1, 0
        if is_best or at.epoch == self.recipe.optim.epochs:
            self.save()
        # Evaluating and saving do not count as time of the next steps.
        self.meter.read(self.stream.wait_seconds)

    def tell_quality(self) -> None:
        """Log what a look at a distillation's student finds and, where it is due, the monitor."""
        at = self.at
        objective = self.engine.trained_objective()  # for both, as it may be a copy
        if self.is_first:
            self.watch.write(objective.student, self.log, step=at.step, epoch=at.epoch)
        self.watchdog.beat()
        if self.monitor is None or not self.monitor.is_due(at.epoch, self.recipe.optim.epochs):
            return
        found = self.monitor.check(objective, on_batch=self.on_batch)
        if self.is_first and found:
            at.monitor = {"epoch": at.epoch, "step": at.step, **found}
            values = {f"monitor/{name}": value for name, value in found.items()}
            self.log.write(at.step, {"epoch": at.epoch, **values})
            logger.info("epoch %d: %s", at.epoch, describe(found))

    def check_settings(self) -> dict:
        """One view of each clip of `val` for all settings of a sweep; the result of the best."""
        results = evaluate_settings(
            self.sweep,
            self.recipe,
            device=self.device,
            score=self.job.scorers.get(("val", 1, 1), score_views),
            on_batch=self.on_batch,
        )
        self.at.sweep = update_records(self.at.sweep, results, epoch=self.at.epoch)
        best = max(range(len(results)), key=lambda number: results[number]["top1"])
        logger.info(
            "epoch %d: top-1 %.2f, top-5 %.2f on val with %s, the best of %d settings",
            *(self.at.epoch, results[best]["top1"], results[best]["top5"]),
            *(self.sweep.settings[best], len(results)),
        )
        return {**results[best], "setting": best}

    def on_batch(self) -> None:
        """A batch of an evaluation between epochs is done."""
        self.watchdog.beat()
        self.stop.check_alone()

    def check_on_val(self, model: torch.nn.Module, which: str) -> dict:
        """One view of each clip of `val`."""
        result = evaluate(
            model,
            self.recipe,
            split="val",
            num_clips=1,
            num_crops=1,
            device=self.device,
            score=self.job.scorers.get(("val", 1, 1), score_views),
            on_batch=self.on_batch,
        )
        logger.info(
            "epoch %d: top-1 %.2f, top-5 %.2f on val%s",
            *(self.at.epoch, result["top1"], result["top5"], which),
        )
        return result

    def save(self) -> None:
        """Have a checkpoint written, which a rerun goes on from, while this run trains on."""
        with naming_clips(self.job, self.folder):
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
        engine = self.engine
        whole = Checkpoint(
            engine.weights(), engine.optimizer_state(), state, ema=engine.ema_weights()
        )
        if not self.is_first:
            return
        self.writer.wait()  # so that memory holds one copy at a time
        copy, best_step = whole.copy(), at.best["step"] if at.best else None
        keep = self.recipe.run.keep_checkpoints

        def write() -> None:
            save_checkpoint(self.checkpoints, copy, metadata=describe_model(self.recipe))
            prune_checkpoints(self.checkpoints, keep=keep, best_step=best_step)

        self.writer.start(write)


@contextmanager
def naming_clips(job: Job, folder: Path) -> Iterator[None]:
    """Give a non-finite loss the names of its clips; all of them go to non_finite.json."""
    try:
        yield
    except NonFiniteError as error:
        names = job.clip_names(error.clip_ids)
        path = folder / "non_finite.json"
        if joined_part().index == 0:
            write_json(path, {"step": error.step, "clips": names})
        shown = ", ".join(names[:SHOWN_CLIPS])
        more = f" and {len(names) - SHOWN_CLIPS} more ({path})" if len(names) > SHOWN_CLIPS else ""
        raise StateError(
            f"{folder}: {error}; clips: {shown}{more}; look at them, or lower optim.lr or set "
            "optim.clip_grad"
        ) from None
