"""The models under upstream's names in timm: import this module, then `timm.create_model(name)`.

Keywords are those of `create_classifier` and `create_student`. timm has no weights for these
models; `distill.students.warmstart.load_weights` reads the released files.
"""

from collections.abc import Callable

from timm.models import register_model
from torch import nn

from distill.students.classifier import create_classifier
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
