"""What contradicts itself between a recipe's engine and the rest of it."""

from collections.abc import Iterator

from distill.recipe import Classify, DeepSpeed, Recipe


def engine_errors(recipe: Recipe) -> Iterator[tuple[tuple[str, ...], str]]:
    """The keys and what is wrong there, in words that follow the key."""
    kind = recipe.engine.kind
    if kind == "ddp":
        return
    if recipe.run.compile != "none":
        yield ("run", "compile"), f"must be none with engine.kind={kind}: only ddp is tried with it"
    if recipe.model.timm is not None:
        yield ("engine", "kind"), f"must be ddp for one of timm's models, as {kind} needs blocks"
    objective = recipe.objective
    if isinstance(objective, Classify) and objective.sweep is not None:
        yield ("engine", "kind"), "must be ddp for objective.sweep, whose probes are small"
    if not isinstance(recipe.engine, DeepSpeed):
        return
    stage = recipe.engine.stage
    for name, least in (("offload_optimizer", 1), ("offload_weights", 3)):
        if getattr(recipe.engine, name) and stage < least:
            yield ("engine", name), f"needs engine.stage {least} or more, which have shards"
    is_half = stage > 0 and recipe.optim.precision != "fp32"
    if is_half and isinstance(objective, Classify) and "BN" in objective.probe_norm:
        yield (
            ("objective", "probe_norm"),
            f"must be LN for ZeRO in {recipe.optim.precision}, which would round running "
            "statistics; set optim.precision=fp32, or engine.kind=ddp",
        )
