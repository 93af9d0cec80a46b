"""RandAugment of a view: random operations on colours and geometry, the same for every frame.

Cubuk et al., RandAugment. Operations, strengths and the fill are timm's increasing variant
(timm/data/auto_augment.py), whose pixels these are; timm itself imports torch, which loader
workers do without.
"""

from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from distill.recipe import RandAugment

Operation = Callable[[Image.Image, float], Image.Image]

_MAX = 10.0  # the largest magnitude; strengths are shares of it
_PROBABILITY = 0.5  # of each drawn operation to take place
_HOW = {"resample": Image.Resampling.BICUBIC, "fillcolor": (128, 128, 128)}
_ADD_BELOW = 128  # SolarizeAdd leaves brighter values alone


def _affine(image: Image.Image, *matrix: float) -> Image.Image:
    return image.transform(image.size, Image.Transform.AFFINE, matrix, **_HOW)


def _enhance(kind: type) -> Operation:
    return lambda image, level: kind(image).enhance(max(0.1, 1.0 + level * 0.9))


def _posterize(image: Image.Image, level: float) -> Image.Image:
    bits = 4 - int(abs(level) * 4)  # none of them at the largest magnitude, which Pillow refuses
    return image.point([value & (256 - (1 << (8 - bits))) for value in range(256)] * 3)


def _solarize_add(image: Image.Image, level: float) -> Image.Image:
    add = int(abs(level) * 110)
    table = [min(255, value + add) if value < _ADD_BELOW else value for value in range(256)]
    return image.point(table * 3)


# Each takes the magnitude as a share of the largest, with a random sign where that has a meaning.
OPERATIONS: dict[str, Operation] = {
    "AutoContrast": lambda image, level: ImageOps.autocontrast(image),
    "Equalize": lambda image, level: ImageOps.equalize(image),
    "Invert": lambda image, level: ImageOps.invert(image),
    "Rotate": lambda image, level: image.rotate(level * 30.0, **_HOW),
    "Posterize": _posterize,
    "Solarize": lambda image, level: ImageOps.solarize(image, 256 - int(abs(level) * 256)),
    "SolarizeAdd": _solarize_add,
    "Color": _enhance(ImageEnhance.Color),
    "Contrast": _enhance(ImageEnhance.Contrast),
    "Brightness": _enhance(ImageEnhance.Brightness),
    "Sharpness": _enhance(ImageEnhance.Sharpness),
    "ShearX": lambda image, level: _affine(image, 1, level * 0.3, 0, 0, 1, 0),
    "ShearY": lambda image, level: _affine(image, 1, 0, 0, level * 0.3, 1, 0),
    "TranslateX": lambda image, level: _affine(image, 1, 0, level * 0.45 * image.width, 0, 1, 0),
    "TranslateY": lambda image, level: _affine(image, 1, 0, 0, 0, 1, level * 0.45 * image.height),
}


def draw_operations(section: RandAugment, rng: np.random.Generator) -> list[tuple[str, float]]:
    """The operations of a view that take place, in order, with their signed levels in [-1, 1].

    They are drawn with replacement; the magnitude's noise is Gaussian, cut off at both ends.
    """
    count = section.num_ops
    names = np.array(list(OPERATIONS))[rng.integers(len(OPERATIONS), size=count)]
    happens = rng.random(count) < _PROBABILITY
    magnitudes = rng.normal(section.magnitude, section.magnitude_std, size=count)
    levels = magnitudes.clip(0.0, _MAX) / _MAX
    signs = np.where(rng.random(count) < 0.5, -1.0, 1.0)
    drawn = zip(names.tolist(), (signs * levels).tolist(), strict=True)
    return [operation for operation, is_on in zip(drawn, happens, strict=True) if is_on]


def apply_operations(image: Image.Image, operations: Sequence[tuple[str, float]]) -> Image.Image:
    """Do to an RGB frame what `draw_operations` gave for its view."""
    for name, level in operations:
        image = OPERATIONS[name](image, level)
    return image
