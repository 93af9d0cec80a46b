"""Any timm model as a frozen teacher, image models frame by frame."""

from torch import Tensor

from distill.students.timm_backbone import TimmBackbone
from distill.teachers.frozen import Teacher


class ImageTeacher(Teacher, TimmBackbone):
    """Features of frames, without a class token, on the grid of the student's tokens.

    The pooled vector is the mean over the frames of what timm's model would classify; nobody
    pays attention. Of a CNN, whose stages differ in width, only one can be taught from.
    """

    has_cls = False
    has_attention = False

    def __init__(
        self,
        name: str,
        *,
        frames: int,
        num_layers: int,
        interval: float,
        image_size: int | None = None,
        side: int | None = None,
        mean: tuple[float, float, float] | None = None,
        std: tuple[float, float, float] | None = None,
    ) -> None:
        super().__init__(
            name,
            frames=frames,
            image_size=image_size,
            side=side,
            num_layers=num_layers,
            interval=interval,
            mean=mean,
            std=std,
        )
        if len(set(self.widths)) > 1:
            widths = ", ".join(map(str, self.widths))
            raise ValueError(
                f"timm's {name}: its last layers are {widths} wide, and a teacher's must be alike; "
                "take one layer"
            )
        self.embed_dim = self.widths[-1]
        self.freeze()

    def see(self, clip: Tensor) -> tuple[list[Tensor], Tensor, None]:
        return *self.show(clip), None

    def tune(self, dtype: object, *, batch_size: int) -> None:
        """Nothing: timm's models choose their own attention and may want weights as they are."""
