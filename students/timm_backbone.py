"""Any model of timm that shows its features, as a teacher, a student or a classifier of clips.

Image models see a clip frame by frame. Features of every shape end on one grid of tokens, where
they meet another model's: https://huggingface.co/docs/timm/feature_extraction.
"""

import dataclasses
import difflib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from torch import Tensor, nn

from distill.students.classifier import HEAD_INIT_SCALE, drop
from distill.students.heads import Decoder
from distill.students.student import DecoderInputs, ProjectorSet
from distill.students.vit import return_layers, take_rows
from distill.students.warmstart import (
    PROJECTORS,
    HeadPolicy,
    LoadReport,
    copy_weights,
    fit_head,
)
from distill.students.weights import read_checkpoint, weights_file

TRUNK = "trunk."


def create_trunk(name: str) -> nn.Module:
    """timm's model `name` with fresh weights and without its classifier.

    Raises ValueError for an unknown name and for a model that shows no features.
    """
    import timm  # not at the top: it takes as long as everything else together

    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), n=3)
        hint = f"; did you mean {' or '.join(close)}?" if close else "; see timm.list_models()"
        raise ValueError(f"timm has no model {name!r}{hint}")
    trunk = timm.create_model(name, pretrained=False, num_classes=0)
    if not hasattr(trunk, "forward_intermediates") or not hasattr(trunk, "feature_info"):
        raise ValueError(f"timm's {name} shows no features (it has no forward_intermediates)")
    return trunk


def resize_features(features: Tensor, *, grid: tuple[int, int, int]) -> Tensor:
    """[B,C,t,h,w] to another grid: bilinear in space, over an area where it shrinks; then time.

    Always in float32, which is what it returns.
    """
    b, _, t, h, w = features.shape
    features = features.float()
    if (h, w) != grid[1:]:
        frames = rearrange(features, "b c t h w -> (b t) c h w")
        frames = F.interpolate(frames, size=grid[1:], mode="bilinear", antialias=True)
        features = rearrange(frames, "(b t) c h w -> b c t h w", b=b)
    if t != grid[0]:
        features = F.interpolate(features, size=grid, mode="trilinear")
    return features


class TimmBackbone(nn.Module):
    """Shows a timm model's last features on a token grid, and its pooled vector.

    `trunk` is timm's model, `depth` the places where it shows features (blocks, or a CNN's stages),
    `return_layers` those taken and `widths` theirs. The grid is `side` by `side` tokens a frame,
    or what the last features have; `mean` and `std` normalise uint8 pixels. timm's drop path
    stays off: its draws would depend on a clip's neighbours in a batch.
    """

    def __init__(
        self,
        name: str,
        *,
        frames: int,
        image_size: int | None = None,
        side: int | None = None,
        num_layers: int = 1,
        interval: float = 1.0,
        mean: tuple[float, float, float] | None = None,
        std: tuple[float, float, float] | None = None,
    ) -> None:
        super().__init__()
        self.name, self.trunk = name, create_trunk(name)
        config = self.trunk.pretrained_cfg
        self.frames, self.image_size = frames, image_size or config["input_size"][-1]
        self.is_video = len(config["input_size"]) == 4  # 3, T, H, W
        self.mean, self.std = mean or tuple(config["mean"]), std or tuple(config["std"])
        _set_image_size(self.trunk, self.image_size, name)
        places = list(self.trunk.feature_info)
        self.depth = len(places)
        self.return_layers = return_layers(self.depth, num_layers, interval)
        self.widths = tuple(places[index]["num_chs"] for index in self.return_layers)
        self.pooled_width = getattr(self.trunk, "head_hidden_size", self.trunk.num_features)
        side = side or math.ceil(self.image_size / places[-1]["reduction"])
        self.grid, self.tubelet = (frames, side, side), 1

    def show(self, clip: Tensor) -> tuple[list[Tensor], Tensor]:
        """Features [B,N,C] of each of `return_layers`, and the pooled vector [B,P].

        The clip [B,3,T,H,W] is uint8, or floating point that is normalised already. Raises
        ValueError for one of another shape than the model was built for.
        """
        expected = (3, self.frames, self.image_size, self.image_size)
        if tuple(clip.shape[1:]) != expected:
            raise ValueError(f"expected a clip [B,{str(expected)[1:-1]}], got {list(clip.shape)}")
        x = self._normalise(clip)
        if not self.is_video:
            x = rearrange(x, "b c t h w -> (b t) c h w")
        last, maps = self.trunk.forward_intermediates(x, indices=list(self.return_layers))
        pooled = self.trunk.forward_head(last, pre_logits=True)
        if not self.is_video:
            maps = [rearrange(z, "(b t) c h w -> b c t h w", t=self.frames) for z in maps]
            pooled = reduce(pooled, "(b t) p -> b p", "mean", t=self.frames)
        maps = [resize_features(features, grid=self.grid) for features in maps]
        return [rearrange(z, "b c t h w -> b (t h w) c") for z in maps], pooled

    def _normalise(self, clip: Tensor) -> Tensor:
        if clip.dtype != torch.uint8:
            return clip
        # The statistics stay Python numbers: a tensor would be copied to the device every time.
        channels = [
            (clip[:, c].float() - 255 * mean) / (255 * std)
            for c, (mean, std) in enumerate(zip(self.mean, self.std, strict=True))
        ]
        return torch.stack(channels, dim=1)

    def layer_ids(self) -> dict[str, int]:
        """timm's layer of every parameter of the trunk, the first 0, by its full name."""
        from timm.models import group_parameters

        matcher = self.trunk.group_matcher(coarse=False)
        ids = group_parameters(self.trunk, matcher, reverse=True)
        return {TRUNK + name: index for name, index in ids.items()}

    def no_weight_decay(self) -> set[str]:
        """What timm keeps from decaying beyond vectors."""
        names = getattr(self.trunk, "no_weight_decay", set)()
        return {TRUNK + name for name in names}


class TimmStudent(TimmBackbone):
    """Predicts a teacher's middle layers and pooled vector from whole frames.

    There is no class token: its row is left out of a teacher's targets. Projectors have the
    names and kinds of `DistillStudent`'s, and as each feature has its place in a map already,
    there are no further positions.
    """

    drop_path_rates = (0.0,)

    def __init__(
        self,
        name: str,
        *,
        frames: int,
        image_size: int,
        side: int,
        teacher_width: int,
        teacher_pooled: int,
        num_layers: int,
        decoder: str,
        others: Mapping[str, ProjectorSet] | None = None,
    ) -> None:
        others = dict(others or {})
        most = max([num_layers, *(projectors.num_layers for projectors in others.values())])
        super().__init__(name, frames=frames, image_size=image_size, side=side, num_layers=most)
        self.num_layers, self.others = num_layers, others
        self.clip_decoder = _decoders(self.widths[-num_layers:], teacher_width, kind=decoder)
        self.final_clip_decoder = (
            Decoder(self.pooled_width, teacher_pooled, kind=decoder)
            if teacher_pooled
            else nn.Identity()
        )
        for other, projectors in self.others.items():
            widths = self.widths[-projectors.num_layers :]
            decoders = _decoders(widths, projectors.width, kind=projectors.decoder)
            self.add_module(f"{other}_decoder", decoders)

    def decoder_inputs(
        self, clip: Tensor, *, tokens: Tensor | None = None, keep: None = None
    ) -> DecoderInputs:
        """Features [B,N,C] of the last layers on the teacher's grid, and the pooled vector [B,P].

        With `tokens` [B,S] their rows alone; the trunk sees whole frames either way.
        """
        features, pooled = self.show(clip)
        if tokens is not None:
            features = [take_rows(rows, tokens.long()) for rows in features]
        others = {
            name: features[-projectors.num_layers :] for name, projectors in self.others.items()
        }
        return DecoderInputs(features[-self.num_layers :], pooled, others)


class TimmClassifier(TimmBackbone):
    """The pooled vector, averaged over frames -> LayerNorm -> dropout -> linear head."""

    drop_path_rates = (0.0,)
    head_drop_path = 0.0

    def __init__(
        self, name: str, *, num_classes: int, frames: int, image_size: int, fc_drop: float = 0.0
    ) -> None:
        super().__init__(name, frames=frames, image_size=image_size)
        self.fc_norm = nn.LayerNorm(self.pooled_width, eps=1e-5)
        self.fc_drop = fc_drop
        self.head = nn.Linear(self.pooled_width, num_classes)
        nn.init.trunc_normal_(self.head.weight, std=0.02 * HEAD_INIT_SCALE)
        nn.init.zeros_(self.head.bias)

    def train(self, mode: bool = True) -> "TimmClassifier":
        """A frozen trunk stays in eval mode: its batch norms would go on learning."""
        super().train(mode)
        if not any(parameter.requires_grad for parameter in self.trunk.parameters()):
            self.trunk.eval()
        return self

    def forward(
        self,
        clip: Tensor | None = None,
        *,
        keep: None = None,
        head_keep: None = None,
        fc_keep: Tensor | None = None,
        features: dict[str, Tensor] | None = None,
    ) -> Tensor:
        """Logits [B,V] of clips [B,3,T,H,W], or of `features` as `VideoClassifier`'s."""
        if features is None:
            features = self.hidden(clip)
        pooled = features["hidden"] if "hidden" in features else features["pooled"]
        return self.head(drop(self.fc_norm(pooled), self, fc_keep))

    def hidden(self, clip: Tensor, *, keep: None = None) -> dict[str, Tensor]:
        """What is frozen in a probe: the pooled vector [B,P], which is all that is left of it."""
        return {"hidden": self.show(clip)[1]}

    def summary(self, h: Tensor) -> dict[str, Tensor]:
        return {"pooled": h}


def load_timm(
    model: TimmBackbone,
    path: str | Path,
    *,
    head: HeadPolicy = "reset",
    allow_missing: Sequence[str] = (),
    allow_unused: Sequence[str] = (),
) -> LoadReport:
    """Copy weights into a model on a timm trunk: a run's, or timm's own file of the trunk.

    Of timm's file the trunk alone is taken, and resized by timm where the model's image size is
    another than timm's. `head` and the rest as in `load_weights`. Raises WeightsError.
    """
    file = weights_file(path)
    state, others, _ = read_checkpoint(file)
    if not any(name.startswith(TRUNK) for name in state):
        return _load_trunk(model, state, file, allow_unused)
    wanted = model.state_dict()
    mapped = fit_head(state, wanted, head, file)
    reset = ("head.",) if head == "reset" and "head.weight" in wanted else ()
    new = ("fc_norm.", *reset) if reset and "fc_norm.weight" not in state else reset
    is_student = any(map(PROJECTORS.match, wanted))
    idle = () if is_student else tuple(filter(PROJECTORS.match, state))
    return copy_weights(
        model,
        {name: value for name, value in state.items() if not name.startswith(reset)},
        file,
        mapped=mapped,
        allow_missing=(*new, *allow_missing),
        allow_unused=(*idle, *allow_unused),
        unused=(*(name for name in state if name.startswith(reset)), *others),
    )


def _load_trunk(
    model: TimmBackbone, state: Mapping[str, Tensor], file: Path, allow_unused: Sequence[str]
) -> LoadReport:
    trunk = create_trunk(model.name)
    classifiers = trunk.pretrained_cfg.get("classifier") or ()
    classifiers = (classifiers,) if isinstance(classifiers, str) else classifiers
    heads = tuple(f"{name}." for name in classifiers)
    report = copy_weights(trunk, state, file, allow_unused=(*heads, *allow_unused))
    _set_image_size(trunk, model.image_size, model.name)
    model.trunk.load_state_dict(trunk.state_dict())
    own = tuple(name for name in model.state_dict() if not name.startswith(TRUNK))
    return dataclasses.replace(report, left_at_init=own)


def _set_image_size(trunk: nn.Module, image_size: int, name: str) -> None:
    config = trunk.pretrained_cfg
    if image_size == config["input_size"][-1]:
        return
    patch = getattr(getattr(trunk, "patch_embed", None), "patch_size", None)
    if patch and image_size % patch[0]:
        raise ValueError(
            f"timm's {name} takes patches of {patch[0]} px, got {image_size} px a side, "
            "which they do not divide; set its image size to a multiple"
        )
    if hasattr(trunk, "set_input_size"):
        trunk.set_input_size((image_size, image_size))
    elif config.get("fixed_input_size"):
        raise ValueError(f"timm's {name} takes {config['input_size'][-1]} px, got {image_size}")


def _decoders(widths: Sequence[int], out_width: int, *, kind: str) -> nn.ModuleList:
    return nn.ModuleList(Decoder(width, out_width, kind=kind) for width in widths)
