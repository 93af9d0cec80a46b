"""What is minimised: modules around a model that turn a batch into named losses.

Both return a dict of float32 scalars of which `loss` is the one to descend. Drop path and dropout
are drawn from the clips' ids, so that neither the order of a batch nor its neighbours, nor which
process has them, nor what was drawn before change a result.
"""

import os
import shutil
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill import draw
from distill.errors import InputError
from distill.kernels import jit
from distill.kernels.alignment import alignment
from distill.kernels.coded_targets import CodedTargets
from distill.kernels.linear_alignment import linear_alignment
from distill.probe import ProbeSweep, settings_of
from distill.recipe import Classify, Compile, Distill, of_teacher
from distill.students.classifier import MERGES, VideoClassifier, keep_factors
from distill.students.heads import Decoder
from distill.students.student import DistillStudent
from distill.students.vit import VideoViT

POOL = ("clip_projector.",)
BACKBONE = ("patch_embed.", "pos_embed", "cls_token", "blocks.", "trunk.")


def draw_keep(model: VideoViT, clip_ids: Tensor, *, seed: int, epoch: int) -> Tensor | None:
    """Drop-path factors [2L,B] of a model in training, drawn from (seed, epoch, clip)."""
    if not model.training or max(model.drop_path_rates) == 0:
        return None
    uniform = draw.uniform(clip_ids, "drop-path", seed, epoch, count=2 * len(model.drop_path_rates))
    return model.drop_path_keep(uniform.T)


def align_layers(
    decoders: Sequence[Decoder],
    states: Sequence[Tensor],
    targets: Tensor | CodedTargets,
    *,
    upstream: float,
) -> Tensor:
    """Loss [K] of decoded states, K of [B,M,D], to targets [K,B,M,E] or codes of them.

    By kernels, the decoders' last linear is part of the loss: nothing as wide as the teacher is
    kept. `upstream` as in `alignment`. Accumulates in float32.
    """
    return linear_alignment(
        [decode.before_last(x) for decode, x in zip(decoders, states, strict=True)],
        [decode.last.weight for decode in decoders],
        [decode.last.bias for decode in decoders],
        [decode.norm.weight for decode in decoders],
        [decode.norm.bias for decode in decoders],
        targets,
        upstream=upstream,
    )


def draw_head_keep(
    model: VideoClassifier, clip_ids: Tensor, *, seed: int, epoch: int
) -> Tensor | None:
    """Factors [B] of the pooled vector of a classifier in training, drawn as `draw_keep`."""
    if not model.training or model.head_drop_path == 0:
        return None
    uniform = draw.uniform(clip_ids, "head-drop-path", seed, epoch, count=1)
    return model.head_keep(uniform[:, 0])


def draw_fc_keep(
    model: VideoClassifier, clip_ids: Tensor, *, seed: int, epoch: int
) -> Tensor | None:
    """Dropout factors [B,F] of what the head of a classifier in training takes."""
    if not model.training or model.fc_drop == 0:
        return None
    width = model.head.in_features
    uniform = draw.uniform(clip_ids, "fc-drop", seed, epoch, count=width)
    return keep_factors(uniform, model.fc_drop)


def compile_losses(objective: nn.Module, mode: Compile, device: torch.device) -> None:
    """Have `torch.compile` take all that an objective does after its draws, in a recipe's mode.

    Backward included. Each size of a micro-batch is compiled once, when it first comes; after
    more sizes than PyTorch keeps (`torch._dynamo.config.recompile_limit`) they run as written.
    Raises InputError where there is no compiler for the device.
    """
    if mode == "none":
        return
    needs = "a C++ compiler (g++)" if device.type == "cpu" else "Triton and a C compiler (gcc)"
    names = ("g++", "clang++") if device.type == "cpu" else ("gcc", "cc", "clang")
    chosen = os.environ.get("CXX" if device.type == "cpu" else "CC")
    has_compiler = any(shutil.which(name) for name in (*filter(None, [chosen]), *names))
    if not has_compiler or (device.type == "cuda" and jit.triton is None):
        raise InputError(
            f"run.compile is '{mode}', which takes {needs}; install that, or set run.compile=none"
        )
    objective.losses = torch.compile(objective.losses, mode=mode, dynamic=False)


class DistillObjective(nn.Module):
    """Aligns a student's projections with its teachers' middle layers and a pooled vector."""

    def __init__(self, student: DistillStudent, section: Distill, *, seed: int) -> None:
        super().__init__()
        self.student = student
        self.seed = seed
        self.middle_weight, self.pooled_weight = section.loss_weights
        self.other_weights = {name: other.weight for name, other in section.others.items()}

    def forward(self, batch: dict) -> dict[str, Tensor]:
        """Losses `loss`, `middle`, `pooled` and one per layer, `layer_00` upwards.

        Of another teacher there are NAME, its layers' mean, and `NAME_layer_00` upwards. The
        batch holds clip_id [B], patches uint8 [B,M-1,U] (whole pixels uint8 [B,3,T,H,W] for a
        student on a model of timm's), tokens [B,M-1], the targets middle
        [K,B,M,E] and middle.NAME (or codes of them) and pooled [B,P], and the epoch. Targets of
        a teacher without a class token have M-1 rows. Accumulates in float32.
        """
        keep = draw_keep(self.student, batch["clip_id"], seed=self.seed, epoch=batch["epoch"])
        return self.losses(batch, keep)

    def losses(self, batch: dict, keep: Tensor | None) -> dict[str, Tensor]:
        """As `forward`, with drop-path factors [2L,B] or None.

        All of it is on the device: what `torch.compile` and CUDA graphs can take as a whole.
        """
        student = self.student
        if "patches" in batch:
            seen = {"patches": batch["patches"], "keep": keep}
        else:
            seen = {"clip": batch["pixels"]}
        states, pooled, others = student.decoder_inputs(tokens=batch["tokens"], **seen)
        states, targets = same_rows(states, batch["middle"])
        layers = align_layers(
            student.clip_decoder,
            states,
            targets,
            upstream=self.middle_weight / len(states),
        )
        middle = layers.mean()
        final = self._final(pooled, batch.get("pooled"))
        loss = self.middle_weight * middle + self.pooled_weight * final
        named = {"middle": middle.detach(), "pooled": final.detach(), **_named(layers)}
        for name, weight in self.other_weights.items():
            layers = align_layers(
                student.get_submodule(f"{name}_decoder"),
                others[name],
                batch[of_teacher("middle", name)],
                upstream=weight / len(others[name]),
            )
            loss = loss + weight * layers.mean()
            named |= {name: layers.detach().mean(), **_named(layers, f"{name}_")}
        return {"loss": loss, **named}

    def _final(self, pooled: Tensor, target: Tensor | None) -> Tensor:
        decode = self.student.final_clip_decoder
        if self.pooled_weight == 0 or isinstance(decode, nn.Identity):
            return torch.zeros((), device=pooled.device)
        raw = decode.head(pooled)[:, None]  # [B,1,P]
        weight, bias = [decode.norm.weight], [decode.norm.bias]
        target = target[None, :, None]  # [1,B,1,P]
        return alignment([raw], weight, bias, target, upstream=self.pooled_weight)[0]


def same_rows(
    states: list[Tensor], targets: Tensor | CodedTargets
) -> tuple[list[Tensor], Tensor | CodedTargets]:
    """Both without the class token's row where one of them has none."""
    ours, theirs = states[0].shape[1], targets.shape[2]
    if ours > theirs:
        return [state[:, 1:] for state in states], targets
    if theirs > ours:
        patches = slice(1, None)
        is_plain = isinstance(targets, Tensor)
        return states, targets[:, :, patches] if is_plain else targets.rows(patches)
    return states, targets


def _named(layers: Tensor, prefix: str = "") -> dict[str, Tensor]:
    return {f"{prefix}layer_{index:02d}": one for index, one in enumerate(layers.detach())}


@torch.no_grad()
def frozen_features(
    model: VideoClassifier,
    clip: Tensor,
    *,
    trainable: Literal["pool", "head"],
    keep: Tensor | None = None,
) -> dict[str, Tensor]:
    """What a probe is trained on: the last block's tokens, or only what the layers above take.

    Nothing of the frozen part is kept for a backward. `keep` are the drop-path factors.
    """
    features = model.hidden(clip, keep=keep)
    return features if trainable == "pool" else model.summary(features["hidden"])


class ClassifyObjective(nn.Module):
    """Cross-entropy with label smoothing; freezes what the recipe does not train."""

    def __init__(self, model: VideoClassifier, section: Classify, *, seed: int) -> None:
        super().__init__()
        self.model = model
        self.seed = seed
        self.label_smoothing = section.label_smoothing
        self.trainable = section.trainable
        self.sweep: ProbeSweep | None = None
        frozen = {"all": (), "pool": BACKBONE, "head": BACKBONE + POOL}[section.trainable]
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not name.startswith((*frozen, *self._idle(model))))
        if section.sweep is not None:
            self.sweep = ProbeSweep(model, settings_of(section.sweep), frozen=frozen)
            model.requires_grad_(False)  # only what the settings have of their own is trained

    @staticmethod
    def _idle(model: nn.Module) -> tuple[str, ...]:
        """What a merge without the pooled vector never looks at, so that it has no gradient."""
        _, with_pooled = MERGES.get(getattr(model, "probe", None), (None, True))
        return () if with_pooled else (*POOL, "fc_norm.")

    def forward(self, batch: dict) -> dict[str, Tensor]:
        """`loss` and `top1` (percent) of clip_id [B], pixels [B,3,T,H,W], label [B] and epoch.

        Of a probe, `features` may be there in place of pixels. `repeat` [B], where it is there,
        tells views of one clip apart. Probabilities `target` [B,V] take the label's place; `top1`
        is then of their largest. Of a sweep `loss` is the sum over its settings, `top1` that of
        the best, and there is one loss for each, `loss_00` upwards. Accumulates in float32.
        """
        ids, epoch = batch["clip_id"], batch["epoch"]
        if "repeat" in batch:
            ids = draw.view_ids(ids, batch["repeat"])
        draws = {
            "keep": draw_keep(self.model, ids, seed=self.seed, epoch=epoch),
            "head_keep": draw_head_keep(self.model, ids, seed=self.seed, epoch=epoch),
            "fc_keep": draw_fc_keep(self.model, ids, seed=self.seed, epoch=epoch),
        }
        return self.losses(batch, **draws)

    def losses(
        self,
        batch: dict,
        *,
        keep: Tensor | None,
        head_keep: Tensor | None,
        fc_keep: Tensor | None,
    ) -> dict[str, Tensor]:
        """As `forward`, with the factors that are drawn: [2L,B], [B] and [B,F]."""
        if self.trainable == "all":
            logits = self.model(
                batch["pixels"], keep=keep, head_keep=head_keep, fc_keep=fc_keep
            )  # [B,V]
        else:
            features = batch.get("features")
            if features is None:
                features = frozen_features(
                    self.model, batch["pixels"], trainable=self.trainable, keep=keep
                )
            probe = self.sweep or self.model
            logits = probe(
                features=features, head_keep=head_keep, fc_keep=fc_keep
            )  # [B,V], of a sweep [B,S*V]
        label, target = batch["label"], batch.get("target")
        if target is not None:
            label = target.argmax(dim=1)
        each = (logits,) if self.sweep is None else self.sweep.split(logits)
        losses = [
            F.cross_entropy(
                one.float(),
                label if target is None else target,
                label_smoothing=self.label_smoothing,
            )
            for one in each
        ]
        top1 = [100 * (one.detach().argmax(dim=1) == label).float().mean() for one in each]
        if self.sweep is None:
            return {"loss": losses[0], "top1": top1[0]}
        named = {f"loss_{number:02d}": loss.detach() for number, loss in enumerate(losses)}
        return {"loss": sum(losses), "top1": torch.stack(top1).max(), **named}
