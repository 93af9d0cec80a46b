"""`distill plan` against the figures of the published models and runs."""

import pytest

from distill.errors import InputError
from distill.plan import make_plan, plan_rows, plan_together, together_rows
from distill.recipe_file import load_recipe


@pytest.fixture(scope="module")
def plans():
    return {name: make_plan(load_recipe(name)) for name in ("S14", "B14", "L14")}


@pytest.mark.parametrize(
    ("name", "peak_lr", "floor_lr", "steps_per_epoch", "steps"),
    [
        ("S14", 0.016, 1.6e-4, 269, 26_900),
        ("B14", 0.016, 1.6e-4, 269, 26_900),
        ("L14", 0.008, 8e-5, 538, 53_800),
    ],
)
def test_schedules_are_the_published_ones(plans, name, peak_lr, floor_lr, steps_per_epoch, steps):
    plan = plans[name]
    assert plan.clips == 1_100_000
    assert plan.epochs == 100
    assert plan.peak_lr == pytest.approx(peak_lr)
    assert plan.floor_lr == pytest.approx(floor_lr)
    assert (plan.steps_per_epoch, plan.steps) == (steps_per_epoch, steps)
    assert plan.warmup_steps == 20 * steps_per_epoch


def test_the_last_batch_is_what_the_full_ones_leave(plans):
    # 268 full batches, as upstream's schedule counts them, and the rest that its loader adds.
    assert plans["S14"].last_batch == 1_100_000 - 268 * 4096


@pytest.mark.parametrize(
    ("name", "parameters", "forward", "step", "step_as_published", "share"),
    [
        ("S14", 29_169_792, 0.0244, 0.0730, 0.0745, 0.986),
        ("B14", 102_252_288, 0.0856, 0.2565, 0.2595, 0.952),
        ("L14", 327_183_872, 0.2793, 0.8376, 0.8415, 0.859),
    ],
)
def test_models_and_flops_are_the_published_ones(
    plans, name, parameters, forward, step, step_as_published, share
):
    plan = plans[name]
    assert plan.parameters == parameters
    assert plan.tokens == 411
    assert plan.forward_tflop == pytest.approx(forward, abs=5e-5)
    assert plan.step_tflop == pytest.approx(step, abs=5e-5)
    assert plan.teacher.step_tflop_all_embedded == pytest.approx(step_as_published, abs=5e-5)
    assert plan.teacher.parameters == 1_020_708_608
    assert plan.teacher.forward_tflop == pytest.approx(5.101, abs=5e-4)
    live = plan.teacher.forward_tflop + plan.step_tflop
    assert plan.teacher.forward_tflop / live == pytest.approx(share, abs=5e-4)


def test_bytes_of_the_cache_are_counted_by_field(plans):
    cache = plans["L14"].cache
    assert cache.record_bytes == {
        "tokens": 820,
        "patches": 241_080,
        "codes": 1_736_064,
        "scales": 4_932,
        "pooled": 1_536,
        "attention": 8_192,
    }
    assert cache.view_bytes == 1_992_624
    assert cache.total_bytes == 1_992_624 * 1_100_000 * 8
    half = make_plan(load_recipe("L14", ["objective.cache.codes=fp16"])).cache
    assert half.record_bytes["codes"] == 6_944_256
    assert "scales" not in half.record_bytes
    small = make_plan(load_recipe("L14", ["objective.cache.codes=3bit"])).cache
    assert small.record_bytes["codes"] == 6 * 411 * 528


@pytest.mark.parametrize(
    ("overrides", "changed", "row"),
    [
        (
            ["tokens=superset"],
            {"tokens": 1640, "next_arrival": 4, "patches": 482_160, "codes": 6 * 821 * 704},
            "820 of a clip's patches; a new mask in every epoch",
        ),
        (
            ["tokens=all"],
            {"tokens": 4096, "next_arrival": 4, "patches": 1_204_224, "codes": 6 * 2049 * 704},
            "2,048 of a clip's patches; a new mask in every epoch",
        ),
        (
            ["pixels=full"],
            {"tokens": 820, "pixels": 1_204_224, "codes": 1_736_064},
            "410 of a clip's patches; the mask of a view stays",
        ),
    ],
)
def test_other_tokens_and_pixels_are_counted(plans, overrides, changed, row):
    plan = make_plan(load_recipe("L14", [f"objective.cache.{line}" for line in overrides]))
    found = plan.cache.record_bytes
    assert {name: found[name] for name in changed} == changed
    assert ("pixels" in found) != ("patches" in found)
    assert found["scales"] == 2 * found["codes"] // 704
    assert dict(plan_rows(plan))["kept tokens"] == row
    assert plan.step_tflop == plans["L14"].step_tflop, "a student sees as many tokens as before"
    more = 16 * 16 * (found["codes"] - 1_736_064)  # 16 clips at once, two float32 copies
    assert plan.cache.build_memory_gb - plans["L14"].cache.build_memory_gb == pytest.approx(
        more / 1e9
    )


def test_cache_breaks_even_after_as_many_epochs_as_it_has_views(plans):
    plan = make_plan(load_recipe("B14", ["optim.epochs=8", "optim.warmup_epochs=0"]))
    assert plan.cache.break_even_epoch == 8
    assert plan.cache.build_hours + plan.hours == pytest.approx(plan.teacher.live_hours)
    plan = plans["B14"]
    assert plan.teacher.live_hours / (plan.cache.build_hours + plan.hours) == pytest.approx(
        100 * (5.1014 + 0.2565) / (8 * 5.1014 + 100 * 0.2565), rel=1e-3
    )


def test_hours_are_flops_over_what_a_device_sustains(plans):
    cache = plans["S14"].cache
    assert cache.build_hours == pytest.approx(8 * 1.1e6 * 5.1014 / 400 / 3600, rel=1e-4)
    slow = make_plan(load_recipe("S14"), sustained_tflops=100)
    assert slow.cache.build_hours == pytest.approx(4 * cache.build_hours)
    assert slow.hours == pytest.approx(4 * plans["S14"].hours)


def test_memory_holds_the_optimiser_and_one_micro_batch(plans):
    plan = make_plan(load_recipe("L14", ["optim.micro_batch=1"]))
    assert plan.memory_gb == pytest.approx(16 * 327_183_872 / 1e9, abs=1)
    assert 5 * plan.memory_gb < plans["L14"].memory_gb < 80
    assert plan.cache.build_memory_gb == pytest.approx(4 * 1.0207, abs=3)


def test_live_targets_need_the_teacher_beside_the_student(plans):
    live = make_plan(load_recipe("S14", ["objective.targets=live"]))
    assert live.cache is None
    assert live.memory_gb > plans["S14"].memory_gb + 4 * 1.0207


def test_clips_are_counted_in_the_list(tmp_path):
    path = tmp_path / "clips.csv"
    path.write_text("".join(f"clip{number}.mp4 0\n" for number in range(5000)))
    plan = make_plan(load_recipe("S14", [f"data.train.list={path}"]))
    assert (plan.clips, plan.steps_per_epoch, plan.last_batch) == (5000, 2, 904)


def test_share_counts_and_unknown_clips_are_refused():
    assert make_plan(load_recipe("S14", ["data.train.share=0.5"])).clips == 550_000
    with pytest.raises(InputError, match=r"^S14: data\.train: the number of clips is not known"):
        make_plan(load_recipe("S14", ["data.train.num_clips=null"]))


def test_classifiers_have_neither_teacher_nor_cache():
    recipe = load_recipe("S14")
    data = recipe.model_dump()
    data["objective"] = {"kind": "classify", "num_classes": 400}
    plan = make_plan(type(recipe).model_validate(data))
    assert (plan.teacher, plan.cache) == (None, None)
    assert plan.parameters == 23_352_976
    assert plan.tokens == 2049
    assert plan.forward_tflop == pytest.approx(0.1665, abs=5e-5)
    assert [label for label, _ in plan_rows(plan)][-2:] == ["time", "  training"]


def test_weights_that_are_only_evaluated_need_no_list_to_train_on():
    settings = ["optim.epochs=0", "data.train.list=null", "data.train.num_clips=null"]
    plan = make_plan(load_recipe("k400/L14", settings))
    assert (plan.clips, plan.steps, plan.hours) == (0, 0, 0.0)
    assert dict(plan_rows(plan)) == {
        "training": "none, as optim.epochs is 0: the weights are evaluated as they are",
        "model": f"L14: {plan.parameters:,} parameters, 2,049 tokens a clip",
        "forward": "1.661 TFLOP a view",
    }
    with pytest.raises(InputError, match="the number of clips is not known"):
        make_plan(load_recipe("k400/L14", settings[1:]))


def test_rows_say_it_in_words(plans):
    rows = dict(plan_rows(plans["L14"]))
    assert rows["steps"] == "100 epochs of 538 steps, the last one of 224 clips: 53,800"
    assert rows["learning rate"] == "peak 0.008 after 10,760 steps, floor 8e-05"
    assert rows["model"] == "L14: 327,183,872 parameters, 411 tokens a clip"
    assert rows["training step"] == "0.8376 TFLOP a clip, of which forward 0.2793 TFLOP"
    assert rows["as published"].startswith("0.8415 TFLOP a clip")
    assert rows["cache"] == "17.54 TB for 8 views of every clip"
    assert rows["break-even"] == "after epoch 8 of 100"


def test_students_together_read_once_and_hold_all_weights(plans):
    plan = plan_together("all", plans)
    assert (plan.students, plan.batch_size) == (("S14", "B14", "L14"), 4096)
    assert plan.epoch_bytes == plans["S14"].cache.view_bytes * 1_100_000
    others = 16e-9 * (29_169_792 + 102_252_288)
    assert plan.memory_gb == pytest.approx(plans["L14"].memory_gb + others)
    assert plan.hours == pytest.approx(sum(one.hours for one in plans.values()))
    assert plan.build_hours == plans["S14"].cache.build_hours
    step = 0.0730 + 0.2565 + 0.8376
    per_clip = 1.1e6 / 400 / 3600
    assert plan.live_hours == pytest.approx(100 * per_clip * (3 * 5.1014 + step), rel=1e-4)
    assert plan.live_together_hours == pytest.approx(100 * per_clip * (5.1014 + step), rel=1e-4)
    rows = dict(together_rows(plan))
    assert rows["records"] == "2.19 TB an epoch, read once for all, 4,096 at a time"
    assert rows["  live, a run each"] == "1,258.2 hours; with the cache 10.5 times faster"
    assert rows["  live, one run"] == "478.8 hours; with the cache 4.0 times faster"


def test_small_jobs_are_told_in_small_units():
    stages = load_recipe("quickstart").stages
    rows = dict(plan_rows(make_plan(stages["distilled"])))
    assert rows["training step"] == "0.105 GFLOP a clip, of which forward 0.036 GFLOP"
    assert rows["memory, training"].endswith(" MB")
    assert rows["  training"] == "under a minute"
    slow = make_plan(stages["distilled"], sustained_tflops=0.01)
    assert dict(plan_rows(slow))["  training"] == "8 minutes"


def test_repeats_are_views_of_an_epoch():
    """1B on K710: 512 views a step are 256 clips twice."""
    overrides = ["data.train.num_clips=1000", "optim.batch_size=512"]
    once = make_plan(load_recipe("k710/S14", [*overrides, "data.augment.repeats=1"]))
    twice = make_plan(load_recipe("k710/S14", [*overrides, "data.augment.repeats=2"]))
    assert (once.steps_per_epoch, once.last_batch) == (2, 488)
    assert (twice.steps_per_epoch, twice.last_batch) == (4, 464)
    assert twice.hours == pytest.approx(2 * once.hours)
    assert twice.peak_lr == once.peak_lr
    assert dict(plan_rows(once))["batch"] == "512 clips, 64 at a time"
    rows = dict(plan_rows(twice))
    assert rows["batch"] == "512 views, 2 of each clip, 64 at a time"
    assert "the last one of 464 views" in rows["steps"]


PROBE = """
data:
  train: {list: null, num_clips: 240000}
  views: {frames: 16}
model: {size: 1B}
objective: {kind: classify, num_classes: 400, trainable: TRAINABLE, features: {folder: f}}
optim: {lr: 1.0e-3, batch_size: 1024, epochs: 20}
"""


@pytest.mark.parametrize(
    ("trainable", "overrides", "fields", "total"),
    [
        ("pool", [], {"hidden": 2 * 4097 * 1408}, "2.77 TB for 1 view of every"),
        ("head", [], {"pooled": 1536}, "370.56 MB for 1 view of every"),
        ("head", ["objective.features.views=4"], {"pooled": 1536}, "1.48 GB for 4 views of every"),
        (
            "head",
            ["objective.probe=cls_avgN_proj"],
            {"tokens": 2 * 17 * 1408, "pooled": 1536},
            "11.86 GB for 1 view of every",
        ),
        ("head", ["objective.probe=cls_avg1"], {"tokens": 2 * 2 * 1408}, "1.35 GB for 1 view"),
    ],
)
def test_features_of_probes_are_counted_in_bytes(tmp_path, trainable, overrides, fields, total):
    path = tmp_path / "r.yaml"
    path.write_text(PROBE.replace("TRAINABLE", trainable))
    plan = make_plan(load_recipe(str(path), overrides))
    assert plan.features.record_bytes == {"pixels_hash": 8, **fields}
    rows = dict(plan_rows(plan))
    assert rows["features"].startswith(total)
    views = plan.features.views
    tflop = views * 240_000 * plan.forward_tflop
    assert plan.features.build_hours == pytest.approx(tflop / (400 * 3600))
    assert plan.step_tflop < 0.02 * plan.forward_tflop  # the backbone runs in no step


def test_a_step_of_a_sweep_trains_every_setting(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(PROBE.replace("TRAINABLE", "head"))
    lists = ["data.val={list: v}", "data.test={list: t}"]
    sweep = "objective.sweep={lrs: [1e-2, 1e-3], weight_decays: [0, 0.1, 0.2]}"
    alone, all_six = (make_plan(load_recipe(str(path), [*lists, *one])) for one in ([], [sweep]))
    assert all_six.step_tflop == pytest.approx(6 * alone.step_tflop)
    assert alone.step_tflop == pytest.approx(3 * 2e-12 * 768 * 400)
