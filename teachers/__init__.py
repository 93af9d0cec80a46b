"""Frozen teachers."""

from distill.teachers.internvideo2 import (
    TEACHERS,
    Teacher,
    TeacherFeatures,
    create_teacher,
    return_layers,
)

__all__ = ["TEACHERS", "Teacher", "TeacherFeatures", "create_teacher", "return_layers"]
