"""Frozen teachers."""

from distill.students.vit import return_layers
from distill.teachers.create import TEACHERS, create_teacher, resolve_teacher
from distill.teachers.frozen import Teacher, TeacherFeatures, fit_clip

__all__ = [
    "TEACHERS",
    "Teacher",
    "TeacherFeatures",
    "create_teacher",
    "fit_clip",
    "resolve_teacher",
    "return_layers",
]
