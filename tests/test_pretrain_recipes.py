"""The recipes of stage-1 pretraining, and several teachers in one, against published figures."""

import pytest

from distill.cost import record_bytes, record_tokens, student_cost, teacher_macs
from distill.errors import InputError
from distill.mask import num_visible, token_grid
from distill.plan import make_plan, plan_rows
from distill.recipe import read_views
from distill.recipe_file import load_recipe


@pytest.fixture(scope="module")
def recipes():
    return {name: load_recipe(f"pretrain/{name}") for name in ("1B", "6B")}


@pytest.fixture(scope="module")
def plans(recipes):
    return {name: make_plan(recipe) for name, recipe in recipes.items()}


@pytest.mark.parametrize(
    ("name", "clips", "batch_size", "micro_batch", "drop_path", "blocks"),
    [("1B", 1_100_000, 4096, 32, 0.25, 40), ("6B", 2_000_000, 2048, 8, 0.3, 48)],
)
def test_settings_are_the_published_ones(
    recipes, name, clips, batch_size, micro_batch, drop_path, blocks
):
    recipe = recipes[name]
    optim, objective, views = recipe.optim, recipe.objective, recipe.data.views
    assert recipe.name == f"pretrain/{name}" and recipe.data.train.num_clips == clips
    assert (recipe.model.size, recipe.model.drop_path) == (name, drop_path)
    assert recipe.model.checkpoint_blocks == blocks and recipe.model.weights is None
    assert (optim.batch_size, optim.micro_batch) == (batch_size, micro_batch)
    assert (optim.lr, optim.lr_per_batch, optim.min_lr, optim.warmup_lr) == (1.5e-4, 256, 1e-5, 0)
    assert (optim.epochs, optim.warmup_epochs) == (300, 40)
    assert (optim.weight_decay, optim.betas, optim.eps) == (0.05, (0.9, 0.98), 1e-6)
    assert (optim.clip_grad, optim.layer_decay, optim.precision) == (3.0, 1.0, "bf16")
    assert (views.frames, views.image_size, views.crop, views.flip) == (8, 224, "multiscale", 0.5)
    assert (views.sampling.kind, views.never_flip) == ("segment", ("ssv2",))
    assert read_views(recipe).frames == 16
    assert (objective.mask.kind, objective.mask.ratio) == ("attention-per-frame", 0.8)
    assert num_visible(token_grid(views), objective.mask) == 416
    assert (objective.decoder, objective.loss_weights) == ("linear", (1, 1))
    main, mae = objective.teacher, objective.others["mae"]
    assert list(objective.others) == ["mae"]
    assert (main.kind, main.size, main.layers, main.interval) == ("internvl", "6B", 6, 1)
    assert (mae.kind, mae.size, mae.layers, mae.interval) == ("videomae", "1B", 4, 1)
    assert (mae.frames, mae.decoder, mae.weight) == (16, "mlp", 1)
    assert main.precision == mae.precision == "bf16"


@pytest.mark.parametrize(
    ("name", "parameters", "forward", "peak_lr", "floor_lr"),
    [("1B", 1_070_042_752, 0.92, 2.4e-3, 1.6e-4), ("6B", 6_075_947_392, 5.15, 1.2e-3, 8e-5)],
)
def test_models_schedules_and_costs_are_the_published_ones(
    plans, name, parameters, forward, peak_lr, floor_lr
):
    plan = plans[name]
    assert plan.parameters == parameters
    assert plan.tokens == 417
    assert (plan.peak_lr, plan.floor_lr) == pytest.approx((peak_lr, floor_lr))
    assert plan.warmup_steps == 40 * plan.steps_per_epoch
    assert plan.forward_tflop == pytest.approx(forward, abs=1e-2)
    each = plan.teacher.each
    assert list(each) == ["main", "mae"]
    assert (each["main"].parameters, each["mae"].parameters) == (5_936_000_768, 1_011_610_752)
    assert each["main"].forward_tflop == pytest.approx(24.67, abs=5e-3)
    assert each["mae"].forward_tflop == pytest.approx(5.09, abs=5e-3)
    assert plan.teacher.forward_tflop == pytest.approx(24.67 + 5.09, abs=1e-2)
    hours = (plan.teacher.forward_tflop + plan.step_tflop) * plan.epochs * plan.clips / 400 / 3600
    assert plan.teacher.live_hours == pytest.approx(hours)


@pytest.mark.parametrize(("name", "forward", "step"), [("1B", 0.92, 2.77), ("6B", 5.15, 15.45)])
def test_a_step_without_recomputed_blocks_costs_what_is_published(recipes, name, forward, step):
    """The published figures embed all patches; recomputing every block adds one forward of it."""
    plain = load_recipe(f"pretrain/{name}", ["model.checkpoint_blocks=0"])
    cost = student_cost(plain, embed_all=True)
    assert (cost.forward, cost.step) == pytest.approx((forward, step), abs=1e-2)
    again = student_cost(recipes[name], embed_all=True).step - cost.step
    assert 0.93 * forward < again < forward


def test_a_record_holds_both_teachers(recipes, plans):
    found = record_bytes(recipes["1B"])
    assert record_tokens(recipes["1B"]) == 416
    assert (
        found
        == plans["1B"].cache.record_bytes
        == {
            "tokens": 2 * 416,
            "patches": 416 * 588,
            "codes": 6 * 417 * 1600,
            "scales": 2 * 6 * 417,
            "codes.mae": 4 * 416 * 704,
            "scales.mae": 2 * 4 * 416,
            "pooled": 2 * 768,
            "attention": 4 * 2048,
        }
    )
    twice = load_recipe("pretrain/1B", ["objective.cache.tokens=superset"])
    assert record_bytes(twice)["next_arrival"] == 4 * 8, "of a race in each frame"
    rows = dict(plan_rows(plans["1B"]))
    assert rows["teacher"] == "internvl 6B: 5,936,000,768 parameters, 24.670 TFLOP a clip"
    assert rows["teacher mae"] == "videomae 1B: 1,011,610,752 parameters, 5.086 TFLOP a clip"
    assert rows["teachers"].startswith("29.756 TFLOP a clip, 89.")


def test_a_teacher_sees_as_many_frames_as_its_tokens_take(recipes):
    """At tubelets of one frame VideoMAE costs the same blocks."""
    eight = load_recipe("pretrain/1B", ["objective.others.mae.frames=8"])
    assert read_views(eight).frames == 8
    embeds = [teacher_macs(recipe, "mae") for recipe in (recipes["1B"], eight)]
    assert embeds[0] - embeds[1] == 2048 * 588 * 1408


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("objective.others.mae.frames=12",
         "objective.others.mae.frames=12: must be a multiple of data.views.frames, 8"),
        ("objective.teacher.frames=16",
         "objective.teacher.frames=16: must be data.views.frames, 8: internvl sees each frame by "
         "itself"),
        ("objective.others.mae.image_size=196",
         "objective.others.mae.image_size=196: must be data.views.image_size, 224: its patches of "
         "14 px are the student's tokens"),
        ("objective.others.mae.layers=41", "objective.others.mae.layers=41: is 41, but the student "
         "has 40 blocks"),
        ("objective.others.mae.interval=20",
         "objective.others.mae.interval=20: 4 layers at interval 20.0 do not fit into 40 blocks"),
        ("objective.others.mae.positions=separable",
         "objective.others.mae.positions=separable: is no setting of kind videomae; drop it"),
        ("objective.others.mae.activation=gelu",
         "objective.others.mae.activation=gelu: is no setting of kind videomae; drop it"),
        ("objective.others.mae.model=resnet50",
         "objective.others.mae.model=resnet50: is no setting of kind videomae, but of timm; drop "
         "it"),
        ("objective.others.mae.size=null", "objective.others.mae.size=null: missing"),
        ("objective.others.mae.random=true",
         "objective.others.mae.random=true: contradicts objective.others.mae.weights"),
        ("objective.others.mae.weights=null",
         "objective.others.mae.weights=null: missing: a teacher is random only where the recipe "
         "says 'random: true'"),
        ("objective.others.mae.weigth=2",
         "objective.others.mae.weigth=2: unknown key, did you mean 'weight'?"),
        ("objective.others.mae.kind=internvit",
         "objective.others.mae.kind=internvit: must be 'internvideo2', 'internvl', 'videomae' or "
         "'timm', got \"internvit\", did you mean 'internvl'?"),
        ("objective.others.MAE={kind: videomae, size: 1B, random: true}",
         "objective.others.MAE={kind: videomae, size: 1B, random: true}: is no name for a teacher: "
         "expected small letters and digits, and none of clip, img, layer, loss, middle, pooled"),
        ("objective.others.clip={kind: videomae, size: 1B, random: true}",
         "objective.others.clip={kind: videomae, size: 1B, random: true}: is no name for a "
         "teacher: expected small letters and digits, and none of clip, img, layer, loss, middle, "
         "pooled"),
        ("objective.teacher={kind: videomae, size: 1B, random: true, frames: 16}",
         "pretrain/_stage1.yaml: objective.mask.kind: needs the attention of internvideo2 or "
         "internvl as objective.teacher, and videomae has none; set random or tube"),
        ("objective.others.mae.weights.extra={checkpoint: x}",
         "objective.others.mae.weights.extra={checkpoint: x}: is for model.weights alone"),
        ("objective.others.mae.weights.checkpoint='stage:x'",
         "objective.others.mae.weights.checkpoint='stage:x': 'stage:x' is a stage, but this recipe "
         "has none"),
    ],
)  # fmt: skip
def test_teachers_that_do_not_go_together_are_refused(override, line):
    with pytest.raises(InputError) as error:
        load_recipe("pretrain/1B", [override])
    lines = str(error.value).splitlines()
    assert any(found.endswith(line) for found in lines), lines


def test_frames_that_teachers_cannot_share_are_refused():
    third = "objective.others.third={kind: internvideo2, size: 1B, random: true, frames: 24}"
    with pytest.raises(InputError, match="mae.frames: must divide the 24 that another teacher tak"):
        load_recipe("pretrain/1B", [third])
    both = load_recipe("pretrain/1B", [third.replace("24", "32")])
    assert read_views(both).frames == 32


def test_a_main_teacher_without_attention_takes_other_masks():
    teacher = "{kind: videomae, size: 1B, random: true, frames: 16, layers: 4, interval: 1}"
    changes = [f"objective.teacher={teacher}", "objective.others={}", "objective.mask.kind=random"]
    recipe = load_recipe("pretrain/1B", changes)
    fields = record_bytes(recipe)
    assert list(fields) == ["tokens", "patches", "codes", "scales"]
    assert fields["codes"] == 4 * 410 * 704
