"""Video students: one transformer, its sizes, and what makes it a student or classifier."""

from distill.students.classifier import VideoClassifier, create_classifier
from distill.students.student import DistillStudent, create_student
from distill.students.vit import SIZES, ViTSize

__all__ = [
    "SIZES",
    "DistillStudent",
    "VideoClassifier",
    "ViTSize",
    "create_classifier",
    "create_student",
]
