"""From recipe sections to models."""

import re

import pytest
import torch
from test_cache_identity import recipe
from torch.testing import assert_close

from distill.errors import InputError
from distill.models import build_student, build_teacher

TEACHER = {
    "size": {"width": 32, "depth": 3, "heads": 2, "pooled_width": 16},
    "random": True,
    "layers": 2,
    "interval": 1.0,
}


def teacher(seed):
    views = {"data__views__frames": 2, "data__views__image_size": 28}
    return build_teacher(recipe(objective__teacher=TEACHER, run__seed=seed, **views))


def test_a_student_of_longer_tokens_than_the_teachers_is_refused():
    message = "tiny: model.tubelet: must be 1, as a teacher's targets are a patch each, got 2"
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        build_student(recipe(model__tubelet=2))


def test_a_random_teacher_is_a_function_of_the_runs_seed():
    torch.manual_seed(1)
    first = teacher(3).state_dict()
    torch.manual_seed(2)
    assert_close(teacher(3).state_dict(), first, rtol=0, atol=0)
    assert not torch.equal(teacher(4).state_dict()["cls_token"], first["cls_token"])


def test_building_a_teacher_draws_nothing_from_the_global_generator():
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    teacher(3)
    assert_close(torch.rand(3), expected, rtol=0, atol=0)
