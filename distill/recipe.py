"""The recipe schema on one page. `distill.recipe_file` reads and checks the files.

A recipe is one run: a model, its data, an objective and how to optimise it. A study is several
runs that share settings: each of its stages is a recipe, run in order in a folder of its own.
Students are several distillations at once, which share what is read from one view cache.
"""

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, field_validator

if TYPE_CHECKING:
    from distill.students.vit import ViTSize

Share = Annotated[float, Field(ge=0, le=1)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
MAIN = ""  # the name of a distillation's main teacher, where all have names
Channels = tuple[float, float, float]
KeptTokens = Literal["visible", "superset", "all"]
Compile = Literal["none", "default", "reduce-overhead"]
KeptPixels = Literal["visible", "full"]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Size(Section):
    """A size of one's own, where none of the named ones fits."""

    width: PositiveInt
    depth: PositiveInt
    heads: PositiveInt
    mlp_ratio: Positive = 4.0
    pooled_width: PositiveInt = 768
    init_std: Positive = 0.02
    layer_scale: Positive = 1e-5


def vit_size(size: str | Size) -> "str | ViTSize":
    """What `create_student` and its siblings take."""
    from distill.students.vit import ViTSize  # not at the top: loader workers do without torch

    return ViTSize(**size.model_dump()) if isinstance(size, Size) else size


class Checkpoint(Section):
    """A file of weights. `checkpoint` may be `stage:NAME`, an earlier stage of the study."""

    checkpoint: str
    sha256: str | None = None
    source: str | None = Field(None, description="where to get it, shown when it is missing")
    frames: PositiveInt | None = Field(None, description="its frames; inferred when not given")


class Weights(Checkpoint):
    """Weights to start from."""

    extra: Checkpoint | None = Field(
        None, description="read over it: a stage-2 file's vision encoder, where the two differ"
    )
    head: Literal["keep", "first", "k600", "k700", "reset"] = Field(
        "reset", description="what becomes of its classification head"
    )
    allow_missing: tuple[str, ...] = Field((), description="key prefixes that may stay at init")
    allow_unused: tuple[str, ...] = Field((), description="key prefixes that may go unused")


class Model(Section):
    """A video transformer of a size, or one of timm's models."""

    size: Literal["S14", "B14", "L14", "1B", "6B"] | Size | None = None
    timm: str | None = Field(None, description="a model's name there, in place of a size")
    tubelet: PositiveInt = 1
    positions: Literal["joint", "separable"] = "joint"
    activation: Literal["gelu_tanh", "gelu"] = "gelu_tanh"
    drop_path: BelowOne = 0.0
    head_drop_path: BelowOne = Field(
        0.0, description="of the pooled vector; upstream's recipes state it, its code ignores it"
    )
    checkpoint_blocks: NonNegativeInt = Field(0, description="blocks recomputed in the backward")
    weights: Weights | None = None


class Teacher(Section):
    """A frozen teacher; `random: true` in place of weights is for measuring and testing only."""

    kind: Literal["internvideo2", "internvl", "videomae", "timm"] = "internvideo2"
    size: Literal["1B", "6B", "S14", "B14", "L14"] | Size | None = Field(
        None, description="of all kinds but timm; internvl's is 6B's and videomae's 1B's"
    )
    model: str | None = Field(None, description="of kind timm: the model's name there")
    frames: PositiveInt | None = Field(
        None, description="that it takes of a view; of more than the student's, two make a token"
    )
    image_size: PositiveInt | None = Field(
        None, description="that views are resized to for it; the student's when not given"
    )
    mean: Channels | None = Field(None, description="that its input is normalised with, and")
    std: Channels | None = Field(None, description="this; the model's own when not given")
    weights: Weights | None = None
    random: bool = False
    positions: Literal["joint", "separable"] = "joint"
    activation: Literal["gelu_tanh", "gelu"] = "gelu_tanh"
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    layers: PositiveInt = 6
    interval: Positive = 3.34


class OtherTeacher(Teacher):
    """A teacher beside the main one, whose middle layers alone are learned from."""

    weight: Positive = Field(1.0, description="of its loss")
    decoder: Literal["mlp", "linear"] = "mlp"


class Demo(Section):
    """Makes the data set of moving digits where it is missing (see distill/data/demo.py)."""

    kind: Literal["moving-digits"]
    folder: str
    train_clips: PositiveInt
    val_clips: PositiveInt
    test_clips: PositiveInt
    seed: int = 0


class ClipList(Section):
    """A list file or a folder of class folders and, for `plan` without it, its number of clips."""

    list: str | None
    part: Literal["train", "val", "test"] | None = Field(
        None, description="of a folder, which names' hashes divide; all of it when not given"
    )
    prefix: str | None = None
    share: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0, description="keep this share of the clips, drawn per class with the run's seed"
    )
    num_clips: PositiveInt | None = None
    source: str | None = Field(None, description="what it is, shown when it is missing")


class SparseSampling(Section):
    """One frame from each of T equal segments that share ends: the published finetuning choice."""

    kind: Literal["sparse"] = "sparse"


class SegmentSampling(Section):
    """Segments of whole frames, as distillation and the Something-Something readers draw them."""

    kind: Literal["segment"]


class DenseSampling(Section):
    """Consecutive frames `stride_frames` apart."""

    kind: Literal["dense"]
    stride_frames: PositiveInt = 4


Sampling = Annotated[SparseSampling | SegmentSampling | DenseSampling, Field(discriminator="kind")]


class Views(Section):
    """What a view of a clip is: which frames, which crop, which flip."""

    frames: PositiveInt = 8
    image_size: PositiveInt = 224
    sampling: Sampling = SparseSampling()
    crop: Literal["multiscale", "resized", "center"] = "multiscale"
    min_area: Share = Field(0.08, description="smallest share of the frame a resized crop keeps")
    flip: Share = Field(0.5, description="probability of a horizontal flip")
    antialias: bool = Field(
        True, description="false resizes plainly, as upstream finetunes and evaluates"
    )
    never_flip: tuple[str, ...] = Field(("ssv2",), description="list sources that are not flipped")
    decoder: Literal["auto", "decord", "pyav"] = "auto"


class RandAugment(Section):
    """Random operations on colours and geometry, the same for all frames of a view.

    Cubuk et al., RandAugment, in timm's increasing variant: `rand-m7-n4-mstd0.5-inc1` is
    magnitude 7, num_ops 4, magnitude_std 0.5.
    """

    magnitude: Annotated[float, Field(ge=0, le=10)] = 7.0
    num_ops: PositiveInt = 4
    magnitude_std: NonNegative = 0.5


class Erase(Section):
    """Random erasing: a box of noise, in the same place of all frames (Zhong et al.)."""

    probability: Share = 0.25


class Augment(Section):
    """What finetuning does to a view on top of its crop and flip; never part of a view cache."""

    rand_augment: RandAugment | None = None
    erase: Erase | None = None
    repeats: PositiveInt = Field(
        1, description="views of a clip side by side in a batch, from frames decoded once"
    )


class Data(Section):
    folder: str | None = Field(
        None,
        description="of class folders of videos, in place of lists; objective.num_classes and "
        "class_names follow from it",
    )
    train: ClipList
    val: ClipList | None = None
    test: ClipList | None = None
    demo: Demo | None = None
    views: Views = Views()
    augment: Augment = Augment()
    workers: PositiveInt = 2
    decode_timeout_seconds: Positive = 60.0
    max_quarantined: Share = Field(0.05, description="stop above this share of undecodable clips")


class Mask(Section):
    """Which tokens a student sees; per frame, as many of each frame."""

    kind: Literal["attention", "attention-per-frame", "tube", "random"] = "attention"
    ratio: BelowOne = 0.8


class Cache(Section):
    """Where the teacher's view records lie, and how they are kept."""

    folder: str
    views: PositiveInt = 8
    seed: int = Field(0, description="of views and masks; runs of any seed train from them")
    codes: Literal["fp16", "8bit", "4bit", "3bit", "2bit"] = "4bit"
    tokens: KeptTokens = Field(
        "visible", description="superset, twice as many, and all: a new mask in every epoch"
    )
    pixels: KeptPixels = Field("visible", description="the kept tokens' patches, or whole frames")
    batch_size: PositiveInt = Field(16, description="clips in a teacher forward while building")
    shard_mb: PositiveInt = 512
    shard_minutes: Positive = 5.0
    teacher_hash: str | None = Field(None, description="trains without the teacher's file")


class Monitor(Section):
    """What a distillation tells of its student between epochs, which learns the same without it.

    Only of clips that are there: the lists `data.val` and, with labels in both, `data.train`.
    """

    every_epochs: PositiveInt = Field(5, description="and after the last one")
    clips: PositiveInt = Field(
        1000, description="of each list, for nearest neighbours and a linear probe of the classes"
    )
    neighbors: PositiveInt = Field(20, description="that vote for a clip's class")
    exact_clips: NonNegativeInt = Field(
        16, description="of `data.val`, for the loss against the teacher itself; 0 for none"
    )


class Distill(Section):
    """Align a student with a frozen teacher's middle layers and pooled vector.

    The attention of `teacher` guides the mask. Others, by name, add their middle layers' losses.
    """

    kind: Literal["distill"]
    teacher: Teacher
    others: dict[str, OtherTeacher] = {}
    mask: Mask = Mask()
    decoder: Literal["mlp", "linear"] = "mlp"
    loss_weights: tuple[NonNegative, NonNegative] = (1.0, 1.0)
    targets: Literal["cached", "live", "hybrid"] = Field(
        "cached", description="hybrid reads what the cache has and makes the rest on the spot"
    )
    cache: Cache | None = None
    monitor: Monitor | None = None

    @field_validator("others")
    @classmethod
    def _in_order(cls, others: dict[str, OtherTeacher]) -> dict[str, OtherTeacher]:
        """By name, so that their order in a file has no say in a record or a student."""
        return dict(sorted(others.items()))

    @property
    def teachers(self) -> dict[str, Teacher]:
        """All of them by name, the main one first, as `MAIN`."""
        return {MAIN: self.teacher, **self.others}


def of_teacher(field: str, name: str) -> str:
    """What a field of a teacher's is called: `codes` of the main one, `codes.mae` of another."""
    return f"{field}.{name}" if name else field


class Mixing(Section):
    """Mixup or CutMix of a batch with itself in reverse, labels and all (Zhang; Yun et al.)."""

    mixup_alpha: Positive = 0.8
    cutmix_alpha: Positive = 1.0
    cutmix_share: Share = Field(0.5, description="how often CutMix is taken: 0 is mixup alone")


class Features(Section):
    """Where what a frozen backbone makes of all views is kept, once for all probes."""

    folder: str
    views: PositiveInt = Field(1, description="of each clip; epoch e learns from view e mod views")
    seed: int = Field(0, description="of the training views; runs of any seed learn from them")
    batch_size: PositiveInt = Field(16, description="clips in a backbone forward while building")
    shard_mb: PositiveInt = 512


class Sweep(Section):
    """Probes of every lr with every weight decay, trained side by side on the same batches."""

    lrs: tuple[Positive, ...] = Field(min_length=1, description="each in place of optim.lr")
    weight_decays: tuple[NonNegative, ...] = (0.0,)


class Classify(Section):
    """Cross-entropy with labels: finetuning, probing or training from scratch."""

    kind: Literal["classify"]
    num_classes: PositiveInt
    class_names: tuple[str, ...] | None = Field(None, description="in the order of labels")
    trainable: Literal["all", "pool", "head"] = Field(
        "all", description="all: finetune; pool: attentive probe; head: linear probe"
    )
    probe: (
        Literal["attentive_mlp", "cls_avg1", "cls_avgN", "cls_avg1_proj", "cls_avgN_proj"] | None
    ) = Field(None, description="an MLP after the pool, or the tokens a linear probe puts together")
    probe_norm: Literal["LN", "BN", "kaiming_BN"] = "LN"
    label_smoothing: Share = 0.1
    fc_drop: Share = 0.0
    mixing: Mixing | None = None
    features: Features | None = Field(None, description="for probes: run the backbone only once")
    sweep: Sweep | None = Field(None, description="for probes: the best on `val` is reported")


class Optim(Section):
    """AdamW with warm-up and cosine. The peak is lr * batch_size / lr_per_batch."""

    lr: Positive
    batch_size: PositiveInt = Field(
        description="clips in an optimiser step, over all processes; of repeats, their views"
    )
    epochs: NonNegativeInt = Field(description="0 evaluates the weights as they are")
    warmup_epochs: NonNegative = 0.0
    min_lr: NonNegative = 1e-5
    warmup_lr: NonNegative = 0.0
    lr_per_batch: PositiveInt | None = Field(256, description="null takes lr as it stands")
    micro_batch: PositiveInt | None = Field(None, description="clips in a forward; all when null")
    weight_decay: NonNegative = 0.05
    betas: tuple[BelowOne, BelowOne] = (0.9, 0.999)
    eps: Positive = 1e-8
    clip_grad: Positive | None = None
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    ema: BelowOne | None = Field(
        None, description="decay a step of an average of the weights, evaluated beside them"
    )


class PlainTorch(Section):
    """Plain torch: a process alone; of several each has the whole model (DDP)."""

    kind: Literal["ddp"] = "ddp"


class FullySharded(Section):
    """torch's FSDP2: each process keeps its shard of weights, gradients and AdamW's state."""

    kind: Literal["fsdp"]
    reshard: bool = Field(
        True,
        description="a block's weights are let go after its forward and fetched again for its "
        "backward; false keeps them: less traffic, more memory",
    )


class DeepSpeed(Section):
    """DeepSpeed's ZeRO: 1 shards AdamW's state, 2 gradients too, 3 the weights too.

    What is not stated here, as fp16's loss scale, is upstream's.
    """

    kind: Literal["deepspeed"]
    stage: Literal[0, 1, 2, 3] = 1
    bucket: PositiveInt = Field(500_000_000, description="numbers in an exchange, of stages 0 to 2")
    stage3_bucket: PositiveInt = Field(
        50_000,
        description="as many of stage 3, fetched ahead too; weights of fewer are never sharded",
    )
    offload_optimizer: bool = Field(
        False, description="AdamW's state and step in the host's memory; of stages 1 to 3"
    )
    offload_weights: bool = Field(
        False, description="shards of weights in the host's memory; of stage 3"
    )


Engine = Annotated[PlainTorch | FullySharded | DeepSpeed, Field(discriminator="kind")]


class Evaluate(Section):
    """Scores of several views of each clip, averaged after the softmax."""

    split: Literal["val", "test"] = "test"
    clips: PositiveInt = 4
    crops: PositiveInt = 3
    batch_size: PositiveInt = 32
    every_epochs: NonNegativeInt = Field(1, description="one-view check on `val`; 0 for never")


class Run(Section):
    folder: str = Field("runs/{name}", description="{name} is the recipe's name")
    seed: int = 0
    save_minutes: Positive = 10.0
    keep_checkpoints: PositiveInt = 2
    damaged_checkpoint: Literal["stop", "previous"] = Field(
        "stop",
        description="what a rerun does when the latest checkpoint is damaged: it stops and names "
        "the file, or goes on from the previous one that is whole and says so",
    )
    log_steps: PositiveInt = 10
    hang_minutes: Positive = Field(
        30.0, description="without a step after which several processes give up, and say why"
    )
    peak_tflops: Positive | None = Field(
        None,
        description="what one device can do in optim.precision, for the MFU; when not given, from "
        "distill/run/meter.py; without it there is no MFU",
    )
    toy: bool = Field(
        False,
        description="shrinks sizes, pixels, batches and epochs, to try a recipe out in seconds "
        "on a CPU, in folders that end in -toy; other overrides are set in what is left",
    )
    kernels: Literal["auto", "torch", "triton"] = Field(
        "auto",
        description="what runs on a GPU: auto takes this project's kernels (triton) if a short "
        "check finds them right on that very device, and torch's operations where it does not",
    )
    compile: Compile = Field(
        "none",
        description="default has torch.compile make one piece of a micro-batch's forward, and one "
        "of its backward; reduce-overhead also replays them as CUDA graphs, for small students "
        "whose kernels are over before the next one is launched",
    )


class Recipe(Section):
    name: str = Field("", description="the file's name when not given")
    run: Run = Run()
    data: Data
    model: Model
    objective: Annotated[Distill | Classify, Field(discriminator="kind")]
    optim: Optim
    engine: Engine = PlainTorch()
    evaluate: Evaluate = Evaluate()


def read_views(recipe: Recipe) -> Views:
    """The views that videos are read as: with the frames of the teacher that takes most.

    Whoever takes fewer has every n-th of them from the first on, the student too.
    """
    views = recipe.data.views
    if not isinstance(recipe.objective, Distill):
        return views
    frames = [teacher.frames or 0 for teacher in recipe.objective.teachers.values()]
    return views.model_copy(update={"frames": max(views.frames, *frames)})


def views_seed(recipe: Recipe) -> int:
    """What a distillation's views and masks are drawn with."""
    cache = recipe.objective.cache
    return cache.seed if cache else recipe.run.seed


class Study(Section):
    """Stages by name, each a whole recipe after the shared sections are merged under it."""

    name: str = ""
    run: Run = Run()
    stages: dict[str, Recipe]


class Students(Section):
    """Recipes by name whose settings students take that learn together from one view cache."""

    name: str = ""
    run: Run = Run()
    students: dict[str, Recipe]
