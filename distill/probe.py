"""Many settings of one probe, trained side by side on what one frozen backbone makes of a batch.

Each setting has a learning rate, a weight decay and trained parts of its own; they begin alike,
see the same batches and draw the same dropout, and end with the weights of a run of their own.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
from rich.table import Table
from torch import Tensor, nn
from torch.func import functional_call

from distill.optim import Schedule, is_decayed, make_schedule
from distill.recipe import Optim, Sweep
from distill.students.classifier import VideoClassifier


@dataclass(frozen=True)
class Setting:
    """What one probe of a sweep is trained with, in place of the recipe's."""

    lr: float
    weight_decay: float

    def __str__(self) -> str:
        return f"lr {self.lr:g}, weight decay {self.weight_decay:g}"


def settings_of(sweep: Sweep) -> list[Setting]:
    """Every learning rate with every weight decay, in the recipe's order."""
    return [Setting(lr, decay) for lr in sweep.lrs for decay in sweep.weight_decays]


def make_schedules(
    optim: Optim, settings: Sequence[Setting], *, steps_per_epoch: int
) -> list[Schedule]:
    """The schedule of each setting, or the one of the recipe where there are none."""
    optims = [optim.model_copy(update={"lr": one.lr}) for one in settings] or [optim]
    return [make_schedule(one, steps_per_epoch=steps_per_epoch) for one in optims]


class ProbeSweep(nn.Module):
    """S probes of one backbone: `parts` has a copy of every child of `model` that is trained.

    `frozen` are prefixes of what they share.
    """

    def __init__(
        self, model: VideoClassifier, settings: Sequence[Setting], *, frozen: tuple[str, ...]
    ) -> None:
        super().__init__()
        self.model, self.settings = model, list(settings)
        trained = {
            name: child
            for name, child in model.named_children()
            if not f"{name}.".startswith(frozen)
        }
        self.parts = nn.ModuleList(nn.ModuleDict(copy.deepcopy(trained)) for _ in settings)

    def forward(
        self,
        clip: Tensor | None = None,
        *,
        features: dict[str, Tensor] | None = None,
        head_keep: Tensor | None = None,
        fc_keep: Tensor | None = None,
    ) -> Tensor:
        """Logits [B,S*V] of all settings, one behind the other, of clips or their `features`."""
        if features is None:
            features = self.model.hidden(clip)
        inputs = {"features": features, "head_keep": head_keep, "fc_keep": fc_keep}
        logits = []
        for part in self.parts:
            own = dict(part.named_parameters()) | dict(part.named_buffers())
            logits.append(functional_call(self.model, own, kwargs=inputs))
        return torch.cat(logits, dim=1)

    def split(self, logits: Tensor) -> tuple[Tensor, ...]:
        """Each setting's logits [B,V] of [B,S*V]."""
        return logits.chunk(len(self.parts), dim=1)

    def param_groups(self, optim: Optim) -> list[dict]:
        """AdamW groups as of `distill.optim.param_groups`, of `parts`; `setting` counts them."""
        groups = []
        for number, (setting, part) in enumerate(zip(self.settings, self.parts, strict=True)):
            for decayed in (True, False):
                named = {
                    name: parameter
                    for name, parameter in part.named_parameters()
                    if parameter.requires_grad and is_decayed(name, parameter) == decayed
                }
                groups.append(
                    {
                        "params": list(named.values()),
                        "names": [f"{number}.{name}" for name in named],
                        "lr_scale": 1.0,
                        "weight_decay": setting.weight_decay if decayed else 0.0,
                        "setting": number,
                    }
                )
        return [group for group in groups if group["params"]]

    def take(self, weights: Mapping[str, Tensor], setting: int) -> None:
        """Give `model` the trained parts of one setting, from the weights of all `parts`."""
        prefix = f"{setting}."
        own = {
            name.removeprefix(prefix): value
            for name, value in weights.items()
            if name.startswith(prefix)
        }
        self.model.load_state_dict({**self.model.state_dict(), **own})


@dataclass
class Record:
    """How one setting has done on `val`: its last top-1 and top-5, and the best top-1 and when."""

    top1: float
    top5: float
    best_top1: float
    best_epoch: int


def update_records(records: list[dict], results: Sequence[Mapping], *, epoch: int) -> list[dict]:
    """The settings' records after one more check, as dicts; of equal bests the first stays."""
    updated = []
    for number, result in enumerate(results):
        before = records[number] if records else None
        is_best = before is None or result["top1"] > before["best_top1"]
        updated.append(
            asdict(
                Record(
                    top1=result["top1"],
                    top5=result["top5"],
                    best_top1=result["top1"] if is_best else before["best_top1"],
                    best_epoch=epoch if is_best else before["best_epoch"],
                )
            )
        )
    return updated


def sweep_summary(settings: Sequence[Setting], records: Sequence[dict], chosen: int) -> dict:
    """What summary.json says of a sweep: all settings with their records, and the chosen one."""
    rows = [asdict(one) | record for one, record in zip(settings, records, strict=True)]
    return {"chosen": rows[chosen], "settings": rows}


def sweep_table(summary: Mapping, *, title: str) -> Table:
    """The settings of a sweep for the console, the chosen one marked; top-1 is on `val`."""
    table = Table(title=f"{title}: settings, on val", title_justify="left")
    for heading in ("lr", "weight decay", "best top-1 %", "in epoch", "last top-1 %", ""):
        table.add_column(heading, justify="right")
    for row in summary["settings"]:
        table.add_row(
            f"{row['lr']:g}",
            f"{row['weight_decay']:g}",
            f"{row['best_top1']:.2f}",
            f"{row['best_epoch']}",
            f"{row['top1']:.2f}",
            "chosen" if row == summary["chosen"] else "",
        )
    return table
