"""What contradicts itself in the recipe of a probe, or of a classifier that is none."""

from collections.abc import Iterator

from distill.recipe import Classify, Recipe, Sweep
from distill.students.classifier import MERGES


def probe_errors(recipe: Recipe, section: Classify) -> Iterator[tuple[tuple[str, ...], str]]:
    """The keys and what is wrong there, in words that follow the key."""
    trainable, is_merge = section.trainable, section.probe in MERGES
    if trainable == "pool" and is_merge:
        yield (
            ("objective", "probe"),
            f"{section.probe} is a linear probe; set objective.trainable=head",
        )
    if trainable == "head" and section.probe == "attentive_mlp":
        yield ("objective", "probe"), "attentive_mlp is trained with the pool; set trainable=pool"
    if section.probe_norm != "LN" and not is_merge:
        yield ("objective", "probe_norm"), f"has no effect without a probe of {', '.join(MERGES)}"
    if trainable == "all":
        for name in ("features", "sweep"):
            if getattr(section, name) is not None:
                yield (
                    ("objective", name),
                    "is for probes, whose backbone is frozen; set objective.trainable to head or "
                    "pool",
                )
        return
    for keys, value in (
        (("model", "drop_path"), recipe.model.drop_path),
        (("model", "checkpoint_blocks"), recipe.model.checkpoint_blocks),
    ):
        if value:
            yield keys, f"must be 0, as objective.trainable={trainable} freezes the blocks"
    if recipe.optim.layer_decay != 1:
        yield ("optim", "layer_decay"), "must be 1, as no block of a probe is trained"
    if section.features is not None:
        if section.mixing is not None:
            yield (
                ("objective", "mixing"),
                "mixes pixels, which cached features no longer have; drop mixing or features",
            )
        if recipe.data.augment.repeats > 1:
            yield (
                ("data", "augment", "repeats"),
                "must be 1 with cached features; raise objective.features.views instead",
            )
    if section.sweep is not None:
        yield from _sweep_errors(recipe, section.sweep)


def _sweep_errors(recipe: Recipe, sweep: Sweep) -> Iterator[tuple[tuple[str, ...], str]]:
    optim, every = recipe.optim, recipe.evaluate.every_epochs
    for name in ("lrs", "weight_decays"):
        values = getattr(sweep, name)
        if len(set(values)) < len(values):
            yield ("objective", "sweep", name), "holds a value twice"
    for name in ("min_lr", "warmup_lr"):
        if getattr(optim, name) > min(sweep.lrs):
            yield ("optim", name), f"must be at most the sweep's smallest lr, {min(sweep.lrs):g}"
    if recipe.data.val is None:
        yield ("data", "val"), "missing: a sweep chooses on it; set data.val.list=FILE"
    if not optim.epochs or not 0 < every <= optim.epochs:
        yield (
            ("evaluate", "every_epochs"),
            f"must be 1 to optim.epochs, {optim.epochs}, as a sweep chooses on val; got {every}",
        )
    if recipe.evaluate.split == "val":
        yield ("evaluate", "split"), "must be 'test', as a sweep's settings are chosen on val"
    if recipe.data.test is None:
        yield ("data", "test"), "missing: a sweep reports on it; set data.test.list=FILE"
    if optim.clip_grad is not None:
        yield ("optim", "clip_grad"), "must be null, as its norm would be over all of a sweep"
    if optim.precision == "fp16":
        yield ("optim", "precision"), "must be fp32 or bf16: a loss scale would be over all probes"
    if optim.ema is not None:
        yield ("optim", "ema"), "must be null with a sweep"
