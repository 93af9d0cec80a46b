"""Our models in timm: import this module, then `timm.create_model(name)`.

Under upstream's names keywords are those of `create_classifier` and `create_student`. timm has no
weights for these; `distill.students.warmstart.load_weights` reads the released files. What
`distill export` writes is a `distill_video`, which timm finds with its weights in the folder:
`timm.create_model("local-dir:FOLDER", pretrained=True)`.
"""

from collections.abc import Callable

from timm.models import load_pretrained, register_model
from torch import nn

from distill.students.classifier import create_classifier
from distill.students.encoder import create_video_model
from distill.students.student import create_student

_SIZES = {"small": "S14", "base": "B14", "large": "L14", "1B": "1B", "6B": "6B"}
_PROBES = {"": None, "_cat": "cls_avgN_proj", "_ap": "attentive_mlp"}
_CLASSES = 400  # Kinetics-400's, where the caller does not say


def _register(name: str, build: Callable[..., nn.Module], size: str, **preset: object) -> None:
    def entry(
        pretrained: bool = False,
        pretrained_cfg: object = None,
        pretrained_cfg_overlay: object = None,
        cache_dir: object = None,
        **settings: object,  # checked by `build`, which takes no others than it names
    ) -> nn.Module:
        if pretrained:
            raise ValueError(
                f"{name}: timm has no weights for it; build it without pretrained and call "
                "distill.students.warmstart.load_weights"
            )
        return build(size, **{**preset, **settings})

    entry.__name__ = entry.__qualname__ = name
    register_model(entry)


for _name, _size in _SIZES.items():
    for _infix, _probe in _PROBES.items():
        _register(
            f"internvideo2{_infix}_{_name}_patch14_224",
            create_classifier,
            _size,
            num_classes=_CLASSES,
            probe=_probe,
        )
for _name in ("small", "base", "large"):
    _register(f"distill_internvideo2_{_name}_patch14_224", create_student, _SIZES[_name])


@register_model
def distill_video(
    pretrained: bool = False,
    pretrained_cfg: dict | None = None,
    pretrained_cfg_overlay: object = None,
    cache_dir: str | None = None,
    pretrained_model_args: object = None,
    **settings: object,  # checked by `create_video_model`, which takes no others than it names
) -> nn.Module:
    """A model of `create_video_model`; as for any of timm's, 0 classes leave the classifier out."""
    model = create_video_model(**settings)
    model.pretrained_cfg = model.default_cfg = pretrained_cfg or {}
    model.num_classes = settings.get("num_classes", 0)
    if pretrained:
        load_pretrained(model, pretrained_cfg, num_classes=model.num_classes, cache_dir=cache_dir)
    return model
