"""Frozen teachers."""

from distill.teachers.create import TEACHERS, create_teacher, resolve_teacher
from distill.teachers.frozen import Teacher, TeacherFeatures, fit_clip, return_layers

__all__ = [
    "TEACHERS",
    "Teacher",
    "TeacherFeatures",
    "create_teacher",
    "fit_clip",
    "resolve_teacher",
    "return_layers",
]
