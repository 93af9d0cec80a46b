"""Strict recipe files: every message names the file and the path, or the override."""

import math
from pathlib import Path

import pytest
import yaml

from distill import recipe_file
from distill.checks.recipe import missing_inputs
from distill.errors import InputError
from distill.recipe import Recipe, Students, Study
from distill.recipe_file import (
    differences,
    dump_recipe,
    find_recipe,
    load_recipe,
    recipe_hash,
    recipe_schema,
    shipped_recipes,
)
from distill.recipe_yaml import parse_yaml

DISTILL = """\
data:
  train: {list: clips.csv}
model:
  size: S14
objective:
  kind: distill
  teacher: {size: 1B, random: true}
  cache: {folder: caches/c}
optim:
  lr: 1e-3
  batch_size: 64
  epochs: 10
"""
CLASSIFY = """\
data:
  train: {list: train.csv}
  val: {list: val.csv}
  test: {list: test.csv}
model:
  size: {width: 96, depth: 2, heads: 2}
objective:
  kind: classify
  num_classes: 5
optim:
  lr: 1e-3
  batch_size: 8
  epochs: 2
"""
MIXING = CLASSIFY.replace("num_classes: 5", "num_classes: 5\n  mixing: {}")
STUDY = """\
data:
  train: {list: train.csv}
  val: {list: val.csv}
  test: {list: test.csv}
model:
  size: S14
optim:
  lr: 1e-3
  batch_size: 8
  epochs: 2
run:
  folder: out/{name}
  seed: 3
stages:
  teacher:
    objective: {kind: classify, num_classes: 5}
    optim: {epochs: 0}
  student:
    model: {size: B14}
    objective:
      kind: distill
      teacher: {size: S14, weights: {checkpoint: 'stage:teacher'}, layers: 4, interval: 1}
      cache: {folder: caches/c}
  finetune:
    model: {size: B14, weights: {checkpoint: 'stage:student'}}
    objective: {kind: classify, num_classes: 5}
"""


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write(name: str, text: str) -> str:
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return name


def mistakes(text: str, *overrides: str, name: str = "r.yaml") -> list[str]:
    write(name, text)
    with pytest.raises(InputError) as error:
        load_recipe(name, overrides)
    return str(error.value).splitlines()


def test_unknown_key_is_named_with_the_nearest():
    lines = mistakes(DISTILL + "  lrr: 2\n", name="recipes/L14.yaml")
    assert lines == ["recipes/L14.yaml: optim.lrr: unknown key, did you mean 'lr'?"]


def test_all_mistakes_are_reported_at_once():
    text = DISTILL.replace("lr: 1e-3", "lr: fast").replace("S14", "S15").replace("epochs: 10", "")
    assert mistakes(text.replace("size: 1B", "sise: 1B") + "modle: {}\n") == [
        "r.yaml: model.size: must be 'S14', 'B14', 'L14', '1B' or '6B', got \"S15\", "
        "did you mean 'S14'?",
        "r.yaml: objective.teacher.sise: unknown key, did you mean 'size'?",
        'r.yaml: optim.lr: must be a valid number, got "fast"',
        "r.yaml: optim.epochs: missing",
        "r.yaml: modle: unknown key, did you mean 'model'?",
    ]


def test_key_in_the_wrong_section_is_sent_to_the_right_one():
    assert mistakes(DISTILL + "lr: 1\n") == ["r.yaml: lr: unknown key, did you mean 'optim.lr'?"]


def test_unknown_key_without_a_near_one_lists_what_is_known():
    text = DISTILL.replace("train: {list", "train: {zzz: 1, list")
    assert mistakes(text) == [
        "r.yaml: data.train.zzz: unknown key; known here: list, part, prefix, share, num_clips, "
        "source",
    ]


def test_unknown_key_of_a_kind_is_compared_with_that_kinds_keys():
    text = CLASSIFY.replace("kind: classify", "kind: classify\n  targets: live\n  targts: live")
    assert mistakes(text) == [
        "r.yaml: objective.targets: is no setting of kind 'classify'",
        "r.yaml: objective.targts: unknown key; known here: kind, num_classes, class_names, "
        "trainable, probe, probe_norm, label_smoothing, fc_drop, mixing, features, sweep",
    ]


@pytest.mark.parametrize(
    ("size", "lines"),
    [
        ("3", ["model.size: must be 'S14', 'B14', 'L14', '1B' or '6B', got 3"]),
        ("{width: 96, dep: 3, heads: 2}", [
            "model.size.depth: missing",
            "model.size.dep: unknown key, did you mean 'depth'?",
        ]),
        ("{width: 97, depth: 3, heads: 2}", [
            "model.size: width 97 must be divisible by 16 and by the number of heads (2)"
        ]),
    ],
)  # fmt: skip
def test_size_is_judged_in_the_form_it_was_written(size, lines):
    text = CLASSIFY.replace("{width: 96, depth: 2, heads: 2}", size)
    assert mistakes(text) == [f"r.yaml: {line}" for line in lines]


def test_kind_must_be_one_of_those_there_are():
    assert mistakes(DISTILL.replace("kind: distill", "kind: distil")) == [
        "r.yaml: objective.kind: must be 'distill' or 'classify', got \"distil\", "
        "did you mean 'distill'?"
    ]
    assert mistakes(DISTILL.replace("kind: distill", "decoder: mlp")) == [
        "r.yaml: objective.kind: missing"
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("  clip_grad: '5'", 'optim.clip_grad: must be a valid number, got "5"'),
        ("  clip_grad: true", "optim.clip_grad: must be a valid number, got true"),
        ("  clip_grad: .inf", "optim.clip_grad: must be a finite number, got Infinity"),
        ("  clip_grad: -1", "optim.clip_grad: must be greater than 0, got -1"),
        ("  micro_batch: 2.5", "optim.micro_batch: must be a valid integer, got 2.5"),
        ("  micro_batch: null", None),
        ("  betas: [0.9, b]", 'optim.betas[1]: must be a valid number, got "b"'),
        ("  betas: [0.9]", "optim.betas[1]: missing"),
        ("run: 3", "run: must be a section, got 3"),
    ],
)
def test_values_are_not_guessed(line, message):
    if message is None:
        assert load_recipe(write("r.yaml", f"{DISTILL}{line}\n")).optim.micro_batch is None
    else:
        assert mistakes(f"{DISTILL}{line}\n") == [f"r.yaml: {message}"]


def test_true_is_no_probability():
    text = DISTILL.replace("clips.csv}", "clips.csv}\n  views: {flip: true}")
    assert mistakes(text) == ["r.yaml: data.views.flip: must be a valid number, got true"]


def test_exponents_are_numbers_and_whole_ones_are_integers():
    text = DISTILL.replace("lr: 1e-3", "lr: 1e-3\n  min_lr: 2.5E-5\n  eps: 1e-06")
    optim = load_recipe(write("r.yaml", text.replace("batch_size: 64", "batch_size: 6.4e+1"))).optim
    assert (optim.lr, optim.min_lr, optim.eps, optim.batch_size) == (1e-3, 2.5e-5, 1e-6, 64)
    assert isinstance(optim.batch_size, int)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: [\n", "r.yaml:3: not valid YAML: did not find expected node content"),
        ("a: 1\nb: 2\na: 3\n", "r.yaml:3: not valid YAML: 'a' is given twice"),
        ("a: 1\non: 3\n", "r.yaml:2: not valid YAML: 'on' is read as True, but a key must be"),
        ("a: !!python/name:os.system\n", "r.yaml:1: not valid YAML: could not determine a"),
        ("", "r.yaml: expected sections such as 'model:' and 'optim:'"),
        ("- a\n", "r.yaml: expected sections such as 'model:' and 'optim:'"),
    ],
)
def test_file_that_is_no_recipe_is_refused_with_its_line(text, message):
    (line,) = mistakes(text)
    assert line.startswith(message)


def test_merge_keys_take_over_what_is_not_given():
    text = CLASSIFY.replace(
        "optim:\n  lr: 1e-3\n  batch_size: 8\n  epochs: 2\n",
        "optim: &some {lr: 1e-3, batch_size: 8, epochs: 2}\n"
        "stages:\n  a: {}\n  b: {optim: {<<: *some, lr: 3}}\n",
    )
    stages = load_recipe(write("r.yaml", text)).stages
    assert [(one.optim.lr, one.optim.epochs) for one in stages.values()] == [(1e-3, 2), (3, 2)]


def test_keys_given_twice_are_found_before_they_are_merged():
    text = "a: {b: {c: &c {x: 1, <<: {x: 2, y: 3}}}}\nd: {<<: *c}\n"
    assert parse_yaml(text, "r") == {"a": {"b": {"c": {"x": 1, "y": 3}}}, "d": {"x": 1, "y": 3}}
    for wrong in ("a: {b: {c: &c {x: 1, x: 2}}}\nd: {<<: *c}\n", "a: {<<: {x: 1, x: 2}}\n"):
        with pytest.raises(InputError, match="^r:1: not valid YAML: 'x' is given twice$"):
            parse_yaml(wrong, "r")


def test_binary_file_is_refused():
    Path("r.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="r.yaml: cannot be read as a text file"):
        load_recipe("r.yaml")


def test_overrides_replace_settings():
    recipe = load_recipe(
        write("r.yaml", DISTILL),
        ["optim.lr=2e-4", "optim.micro_batch=8", "data.views.sampling={kind: dense}",
         "data.views.never_flip=[a,b]", "objective.cache.teacher_hash=null", "run.folder=x=y"],
    )  # fmt: skip
    assert recipe.optim.lr == 2e-4
    assert recipe.optim.micro_batch == 8
    assert recipe.data.views.sampling.kind == "dense"
    assert recipe.data.views.never_flip == ("a", "b")
    assert recipe.run.folder == "x=y"


def test_mistakes_in_overrides_are_named_by_the_override():
    assert mistakes(
        DISTILL,
        "optim.lrr=3",
        "optim.lr=true",
        "model.size={width: 96, dep: 3, heads: 2}",
        "data.views.sampling={stride_frames: 4}",
        "optim.betas=[0,a]",
    ) == [
        "r.yaml: data.views.sampling.kind: missing",
        "r.yaml: model.size.depth: missing",
        "model.size={width: 96, dep: 3, heads: 2}: model.size.dep: unknown key, "
        "did you mean 'depth'?",
        "optim.lr=true: must be a valid number, got true",
        'optim.betas=[0,a]: must be a valid number, got "a"',
        "optim.lrr=3: unknown key, did you mean 'lr'?",
    ]


def test_what_an_override_replaced_is_not_blamed():
    write("base.yaml", DISTILL.replace("clips.csv}", "clips.csv}\n  views: {sampling: {kind: x}}"))
    assert mistakes("base: base.yaml\n", "data.views.sampling={stride_frames: 4}") == [
        "r.yaml: data.views.sampling.kind: missing"
    ]


@pytest.mark.parametrize("text", ["optim.lr", "=3", "optim..lr=3", "a.=3"])
def test_malformed_override_is_refused(text):
    assert mistakes(DISTILL, text) == [f"{text}: expected section.key=value, such as optim.lr=1e-4"]


def test_base_is_merged_below_the_file():
    write("a/base.yaml", DISTILL)
    recipe = load_recipe(
        write("b/r.yaml", "base: ../a/base.yaml\nmodel: {size: L14}\noptim: {batch_size: 32}\n")
    )
    assert recipe.model.size == "L14"
    assert (recipe.optim.batch_size, recipe.optim.lr, recipe.optim.epochs) == (32, 1e-3, 10)


def test_name_is_not_inherited():
    write("base.yaml", "name: other\n" + DISTILL)
    recipe = load_recipe(write("r.yaml", "base: base.yaml\n"))
    assert (recipe.name, recipe.run.folder) == ("r", "runs/r")


def test_another_kind_replaces_the_section():
    write("base.yaml", DISTILL)
    text = "base: base.yaml\nobjective: {kind: classify, num_classes: 3}\n"
    recipe = load_recipe(write("r.yaml", text + "data: {test: {list: t.csv}}\n"))
    assert recipe.objective.num_classes == 3


def test_base_may_be_a_shipped_recipe_unless_a_file_of_that_name_lies_beside():
    text = "base: k400/S14.yaml\nobjective: {num_classes: 7}\n"
    recipe = load_recipe(write("r.yaml", text))
    shipped = load_recipe("k400/S14")
    assert (recipe.objective.num_classes, recipe.optim) == (7, shipped.optim)
    write("S14.yaml", DISTILL)
    assert load_recipe(write("r.yaml", "base: S14.yaml\n")).optim == load_recipe("S14.yaml").optim
    with pytest.raises(InputError, match=r"base: nosuch.yaml: no such file"):
        load_recipe(write("r.yaml", "base: nosuch.yaml\n"))


def test_mistake_in_a_base_is_named_by_the_base():
    write("base.yaml", DISTILL + "  lrr: 1\n")
    assert mistakes("base: base.yaml\noptim: {wd: 1}\nmodel: {size: [1]}\n") == [
        "r.yaml: model.size: must be 'S14', 'B14', 'L14', '1B' or '6B', got [1]",
        "base.yaml: optim.lrr: unknown key, did you mean 'lr'?",
        "r.yaml: optim.wd: unknown key; known here: lr, batch_size, epochs, warmup_epochs, "
        "min_lr, warmup_lr, lr_per_batch, micro_batch, weight_decay, betas, eps, clip_grad, "
        "layer_decay, precision, ema",
    ]


def test_of_several_bases_the_later_goes_over_the_earlier():
    write("a.yaml", DISTILL)
    write("b.yaml", "name: b\nmodel: {size: L14, drop_path: 0.1}\noptim: {epochs: 3}\n")
    recipe = load_recipe(write("r.yaml", "base: [a.yaml, b.yaml]\nmodel: {size: B14}\n"))
    alone = load_recipe("a.yaml")
    assert (recipe.name, recipe.model.size, recipe.model.drop_path) == ("r", "B14", 0.1)
    assert (recipe.optim.epochs, recipe.optim.lr) == (3, alone.optim.lr)
    assert mistakes("base: [a.yaml, none.yaml]\n") == ["r.yaml: base: none.yaml: no such file"]


def test_bases_that_lead_nowhere_are_refused():
    assert mistakes("base: none.yaml\n") == ["r.yaml: base: none.yaml: no such file"]
    write("a.yaml", "base: r.yaml\n")
    assert mistakes("base: a.yaml\n") == ["r.yaml: base: is its own base, by way of a.yaml"]


def test_dotted_paths_are_relative_to_their_file(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    write("a/base.yaml", DISTILL.replace("caches/c", "./c"))
    text = "base: ../a/base.yaml\ndata: {train: {list: ../l.csv, prefix: '~/v', source: ./no}}\n"
    recipe = load_recipe(write("b/r.yaml", text), ["run.folder=./out", "data.val={list: ~/v.csv}"])
    assert recipe.objective.cache.folder == str(tmp_path / "a/c")
    assert recipe.data.train.list == str(tmp_path / "l.csv")
    assert recipe.data.train.prefix == "/home/me/v"
    assert recipe.data.train.source == "./no"
    assert recipe.run.folder == str(Path("out").absolute())
    assert recipe.data.val.list == "/home/me/v.csv"


@pytest.mark.parametrize("path", ["../l.csv", "./l.csv", "l.csv", "a/../l.csv", "~/l.csv"])
def test_paths_of_overrides_survive_the_run_folder(path):
    """A rerun reads them back from RUN/recipe.yaml and must find nothing changed."""
    recipe = load_recipe(write("r.yaml", CLASSIFY), [f"data.train.list={path}"])
    kept = load_recipe(write("runs/r/recipe.yaml", dump_recipe(recipe)))
    assert differences(kept, recipe) == []
    assert kept.data.train.list == recipe.data.train.list


def test_plain_paths_are_left_to_the_working_directory():
    recipe = load_recipe(write("a/r.yaml", DISTILL))
    assert (recipe.data.train.list, recipe.objective.cache.folder) == ("clips.csv", "caches/c")


def test_study_merges_shared_sections_below_each_stage():
    study = load_recipe(write("demo.yaml", STUDY))
    assert isinstance(study, Study)
    assert (study.name, study.run.folder) == ("demo", "out/demo")
    assert list(study.stages) == ["teacher", "student", "finetune"]
    assert [stage.model.size for stage in study.stages.values()] == ["S14", "B14", "B14"]
    assert [stage.optim.epochs for stage in study.stages.values()] == [0, 2, 2]
    assert {stage.run.seed for stage in study.stages.values()} == {3}
    teacher = study.stages["teacher"]
    assert (teacher.name, teacher.run.folder) == ("demo/teacher", "out/demo/teacher")


def test_override_without_a_stage_holds_for_all_stages():
    study = load_recipe(
        write("r.yaml", STUDY),
        ["stages.student.optim.epochs=9", "optim.epochs=7", "run.folder=o", "run.seed=4"],
    )
    assert [stage.optim.epochs for stage in study.stages.values()] == [7, 9, 7]
    assert study.stages["finetune"].run.folder == "o/finetune"
    assert study.stages["finetune"].run.seed == study.run.seed == 4


def test_override_of_one_stage_leaves_the_others_alone():
    study = load_recipe(write("r.yaml", STUDY), ["stages.student.optim.epochs=9"])
    assert [stage.optim.epochs for stage in study.stages.values()] == [0, 9, 2]


def test_mistakes_in_a_study_name_shared_section_or_stage_once():
    text = STUDY.replace("  epochs: 2", "  epoch: 2").replace(
        "optim: {epochs: 0}", "optim: {epochs: 0, lrr: 1}"
    )
    assert mistakes(text, "stages.studnt.optim.lr=1", "stages.student.model.sise=B14") == [
        "stages.studnt.optim.lr=1: expected stages.NAME.section.key=value, NAME of teacher, "
        "student, finetune",
        "r.yaml: optim.epoch: unknown key, did you mean 'epochs'?",
        "r.yaml: stages.teacher.optim.lrr: unknown key, did you mean 'lr'?",
        "stages.student.model.sise=B14: unknown key, did you mean 'size'?",
        "r.yaml: stages.student.optim.epochs: missing",
        "r.yaml: stages.finetune.optim.epochs: missing",
    ]


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (("checkpoint: 'stage:student'", "checkpoint: 'stage:studnt'"),
         "stages.finetune.model.weights.checkpoint: no stage 'studnt' comes before this one, "
         "did you mean 'student'?"),
        (("checkpoint: 'stage:teacher'", "checkpoint: 'stage:finetune'"),
         "stages.student.objective.teacher.weights.checkpoint: no stage 'finetune' comes before "
         "this one"),
        (("optim: {epochs: 0}", "run: {folder: x}"),
         "stages.teacher: has no name or folder but those the study gives it"),
        (("  seed: 3", "  sed: 3"), "run.sed: unknown key, did you mean 'seed'?"),
        (("  teacher:\n    objective", "  a/b:\n    objective"),
         "stages.a/b: expected a plain name and sections below it"),
    ],
)  # fmt: skip
def test_contradictions_in_a_study_are_found(change, line):
    assert f"r.yaml: {line}" in mistakes(STUDY.replace(*change))


def test_empty_study_is_refused():
    text = STUDY.split("stages:")[0] + "stages: {}\n"
    assert mistakes(text) == ["r.yaml: stages: expected at least one stage by name"]


@pytest.mark.parametrize(
    ("text", "override", "line"),
    [
        (DISTILL, "model.weights={checkpoint: 'stage:x'}",
         "model.weights={checkpoint: 'stage:x'}: model.weights.checkpoint: 'stage:x' is a stage, "
         "but this recipe has none"),
        (DISTILL, "data.views.image_size=225",
         "data.views.image_size=225: must be divisible by the patch, 14 px"),
        (CLASSIFY, "model.tubelet=3", "r.yaml: data.views.frames: must be divisible by "
         "model.tubelet, 3"),
        (DISTILL, "model.drop_path=1", "model.drop_path=1: must be less than 1, got 1"),
        (DISTILL, "optim.betas=[0.9,1]", "optim.betas=[0.9,1]: must be less than 1, got 1"),
        (DISTILL, "model.tubelet=2",
         "model.tubelet=2: must be 1, as a teacher's targets are a patch each"),
        (DISTILL, "optim.warmup_epochs=11",
         "optim.warmup_epochs=11: must be at most optim.epochs, 10"),
        (DISTILL, "run={keep_checkpoints: 1, damaged_checkpoint: previous}",
         "run={keep_checkpoints: 1, damaged_checkpoint: previous}: run.keep_checkpoints: must be "
         "at least 2 for run.damaged_checkpoint: previous"),
        (DISTILL, "optim.micro_batch=65",
         "optim.micro_batch=65: must be at most optim.batch_size, 64"),
        (DISTILL, "data.augment.rand_augment={}",
         "data.augment.rand_augment={}: only for objective.kind: classify; a teacher's targets are "
         "of views without it"),
        (DISTILL, "data.augment.erase={}",
         "data.augment.erase={}: only for objective.kind: classify; a teacher's targets are of "
         "views without it"),
        (DISTILL, "data.augment.repeats=2",
         "data.augment.repeats=2: must be 1, but for objective.kind: classify"),
        (DISTILL, "data.views.antialias=false",
         "data.views.antialias=false: must be true, but for objective.kind: classify"),
        (DISTILL, "model.head_drop_path=0.5",
         "model.head_drop_path=0.5: must be 0, as a student has no classification head"),
        (CLASSIFY, "data.augment.repeats=3",
         "r.yaml: optim.batch_size: counts views, and must be divisible by data.augment.repeats, "
         "3"),
        (CLASSIFY, "model.weights={checkpoint: w.pt, head: k600}",
         "model.weights={checkpoint: w.pt, head: k600}: model.weights.head: makes rows for 600 "
         "classes, but objective.num_classes is 5; set head=reset, or the classes"),
        (MIXING, "optim.batch_size=7",
         "optim.batch_size=7: must be even, as objective.mixing mixes clips in pairs"),
        (MIXING, "optim.micro_batch=5",
         "optim.micro_batch=5: must be even, as objective.mixing mixes clips in pairs"),
        (DISTILL, "optim.min_lr=1", "optim.min_lr=1: must be at most optim.lr, 0.001"),
        (DISTILL, "objective.teacher.layers=13",
         "objective.teacher.layers=13: is 13, but the student has 12 blocks"),
        (DISTILL, "objective.teacher.interval=8",
         "objective.teacher.interval=8: 6 layers at interval 8.0 do not fit into 40 blocks"),
        (DISTILL, "objective.cache=null",
         "objective.cache=null: missing: give it a folder, or set objective.targets=live"),
        (DISTILL, "objective.teacher.weights={checkpoint: t.pt}",
         "r.yaml: objective.teacher.random: contradicts objective.teacher.weights"),
        (DISTILL, "objective.teacher.random=false",
         "r.yaml: objective.teacher.weights: missing: a teacher is random only where the recipe "
         "says 'random: true'"),
    ],
)  # fmt: skip
def test_sections_that_contradict_each_other_are_found(text, override, line):
    assert line in mistakes(text, override)


def write_students(shared: str = "", *, second: str = "optim: {batch_size: 32}") -> str:
    """A recipe of two students, `one` and `two`, both in the folder a."""
    write("a/one.yaml", "name: other\n" + DISTILL)
    write("a/two.yaml", f"base: one.yaml\n{second}\n")
    return write("a/both.yaml", f"students: [one, two]\n{shared}")


def student_mistakes(shared: str, *overrides: str, second: str = "") -> list[str]:
    path = write_students(shared, second=second)
    with pytest.raises(InputError) as error:
        load_recipe(path, overrides)
    return str(error.value).splitlines()


def test_students_take_their_own_recipes_under_the_shared_sections():
    path = write_students("run: {folder: 'out/{name}', seed: 3}\noptim: {epochs: 7}\n")
    students = load_recipe(path)
    assert isinstance(students, Students)
    assert (students.name, students.run.folder) == ("both", "out/both")
    one, two = students.students.values()
    assert (one.name, one.run.folder) == ("both/one", "out/both/one")
    assert (two.name, two.run.folder) == ("both/two", "out/both/two")
    assert [(r.optim.batch_size, r.optim.epochs, r.run.seed) for r in (one, two)] == [
        (64, 7, 3),
        (32, 7, 3),
    ]


def test_overrides_hold_for_all_students_or_for_one():
    overrides = ["students.two.optim.lr=5e-4", "optim.lr=2e-3", "run.folder=o", "data.workers=1"]
    one, two = load_recipe(write_students(), overrides).students.values()
    assert (one.optim.lr, two.optim.lr) == (2e-3, 5e-4)
    assert (one.data.workers, two.data.workers, two.run.folder) == (1, 1, "o/two")


def test_an_override_chooses_the_students():
    students = load_recipe(write_students(), ["students=[two]", "students.two.optim.epochs=3"])
    assert {name: one.optim.epochs for name, one in students.students.items()} == {"two": 3}


def test_a_student_is_a_recipe_beside_the_file_or_a_shipped_one():
    write("a/S14.yaml", DISTILL.replace("epochs: 10", "epochs: 4"))
    path = write("a/r.yaml", "students: [S14, ../b/x.yaml]\n")
    write("b/x.yaml", "base: ../a/S14.yaml\n")
    students = load_recipe(path).students
    assert {name: one.optim.epochs for name, one in students.items()} == {"S14": 4, "x": 4}
    shipped = load_recipe(write("c/r.yaml", "students: [S14, B14]\n")).students
    assert [one.model.size for one in shipped.values()] == ["S14", "B14"]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("students: one", "r.yaml: students: expected a list of recipes, such as [S14, B14]"),
        ("students: []", "r.yaml: students: expected a list of recipes, such as [S14, B14]"),
        ("students: [one, x]", "r.yaml: students: x: no such file. Shipped recipes: B14, "),
        ("students: [one, one]", "r.yaml: students: one: expected a plain name, and each only"),
        ("students: [one, r]", "r.yaml: students: r is several recipes, expected one of one "),
        (
            "students: [one]\nstages: {a: {}}",
            "r.yaml: students: unknown key; known here: name, run",
        ),
    ],
)
def test_what_names_no_student_is_refused(text, line):
    write("one.yaml", DISTILL)
    if "stages" in text:
        text += "\n" + DISTILL
    assert mistakes(text)[0].startswith(line)


def test_mistakes_of_students_name_the_file_they_are_in():
    lines = student_mistakes(
        "optim: {lrr: 1}\n", "students.three.optim.lr=1", "students.two.run.folder=x",
        "students.one.optim.epochs=few", second="model: {size: S15}",
    )  # fmt: skip
    assert lines == [
        "students.three.optim.lr=1: expected students.NAME.section.key=value, NAME of one, two",
        "students.two.run.folder=x: follows from the name and run.folder of the whole recipe",
        'students.one.optim.epochs=few: must be a valid integer, got "few"',
        "a/both.yaml: optim.lrr: unknown key, did you mean 'lr'?",
        "a/two.yaml: model.size: must be 'S14', 'B14', 'L14', '1B' or '6B', got \"S15\", "
        "did you mean 'S14'?",
    ]


@pytest.mark.parametrize(
    ("setting", "found", "other"),
    [
        ("run.seed", "1", "0"),
        ("run.kernels", '"triton"', '"auto"'),
        ("data.train.list", '"l.csv"', '"clips.csv"'),
        ("data.train.share", "0.5", "1.0"),
        ("data.views.frames", "4", "8"),
        ("objective.mask.ratio", "0.5", "0.8"),
        ("objective.teacher.layers", "3", "6"),
        ("objective.cache.views", "2", "8"),
        ("objective.cache.folder", '"x"', '"caches/c"'),
        ("objective.cache.codes", '"fp16"', '"4bit"'),
    ],
)
def test_students_agree_on_all_that_they_read(setting, found, other):
    override = f"students.two.{setting}={found}"
    assert student_mistakes("", override) == [
        f"{override}: is {found} for two, but {other} for one"
    ]


def test_students_agree_on_other_teachers_but_not_on_their_losses():
    video = "{size: 1B, random: true, layers: 4}"
    shared = f"objective: {{others: {{video: {video}}}}}\n"
    path = write_students(shared)
    own = ["weight=2", "decoder=linear"]
    students = load_recipe(path, [f"students.two.objective.others.video.{one}" for one in own])
    videos = [one.objective.others["video"] for one in students.students.values()]
    assert [(one.weight, one.decoder) for one in videos] == [(1, "mlp"), (2, "linear")]
    override = "students.two.objective.others.video.layers=3"
    assert student_mistakes(shared, override) == [f"{override}: is 3 for two, but 4 for one"]


def test_students_learn_from_cached_targets():
    override = "students.two.objective.targets=live"
    assert student_mistakes("", override) == [
        f"{override}: must be 'cached' for students of one recipe"
    ]
    classify = "data: {test: {list: t.csv}}\nobjective: {kind: classify, num_classes: 5}"
    assert student_mistakes("", second=classify) == [
        "a/two.yaml: objective.kind: must be 'distill', as two is a student"
    ]


def test_students_learn_in_plain_torch():
    override = "students.two.engine.kind=fsdp"
    assert student_mistakes("", override) == [
        f"{override}: must be 'ddp' for students of one recipe"
    ]


def test_batches_of_students_divide_the_largest():
    assert student_mistakes("", second="optim: {batch_size: 48}") == [
        "a/two.yaml: optim.batch_size: 48 of two must divide the 64 of one"
    ]


@pytest.mark.parametrize("text", [DISTILL, CLASSIFY, STUDY])
def test_dumped_recipe_reads_back_equal(text):
    loaded = load_recipe(write("r.yaml", text), ["optim.lr=3e-5"])
    dumped = dump_recipe(loaded)
    assert load_recipe(write("runs/r/recipe.yaml", dumped)) == loaded
    assert yaml.safe_load(dumped)["name"] == "r"


def test_hash_ignores_what_has_no_say_in_the_result():
    recipe = load_recipe(write("r.yaml", DISTILL))
    harmless = [
        "name=n", "run.folder=x", "run.log_steps=1", "run.save_minutes=1", "run.hang_minutes=1",
        "run.keep_checkpoints=9", "run.damaged_checkpoint=previous",
        "data.workers=7", "data.decode_timeout_seconds=5",
        "data.train.prefix=/v", "data.train.source=s", "objective.cache.folder=x",
        "objective.cache.shard_mb=1", "engine={kind: fsdp, reshard: false}",
    ]  # fmt: skip
    other = load_recipe("r.yaml", harmless)
    assert other != recipe
    assert recipe_hash(other) == recipe_hash(recipe)
    assert differences(recipe, other) == []


def test_differences_name_settings_and_both_values():
    recipe = load_recipe(write("r.yaml", DISTILL))
    other = load_recipe(
        "r.yaml", ["optim.lr=2e-3", "run.kernels=triton", "data.views.sampling.kind=dense"]
    )
    assert recipe_hash(other) != recipe_hash(recipe)
    assert differences(recipe, other) == [
        'data.views.sampling.kind: "sparse", now "dense"',
        "data.views.sampling.stride_frames: null, now 4",
        "optim.lr: 0.001, now 0.002",
        'run.kernels: "auto", now "triton"',
    ]


def test_weights_known_by_their_hash_may_lie_anywhere():
    """As a file beside a recipe does after the checkout was moved."""
    here, there, other = (
        load_recipe(write("r.yaml", CLASSIFY), [f"model.weights={{checkpoint: {path}, {known}}}"])
        for path, known in (("a/w.pt", "sha256: ab"), ("b/w.pt", "sha256: ab"), ("b/w.pt", ""))
    )
    assert differences(here, there) == []
    assert recipe_hash(here) == recipe_hash(there)
    assert differences(there, other) == [
        'model.weights.checkpoint: null, now "b/w.pt"',
        'model.weights.sha256: "ab", now null',
    ]


def test_shipped_recipe_is_found_by_name_from_anywhere():
    path = find_recipe("L14")
    assert path == find_recipe("recipes/L14.yaml") == shipped_recipes()["L14"]
    assert load_recipe("L14").model.size == "L14"


def test_a_file_comes_before_a_shipped_recipe():
    write("recipes/L14.yaml", CLASSIFY)
    assert load_recipe("recipes/L14.yaml").objective.num_classes == 5


def test_missing_recipe_is_answered_with_the_shipped_ones():
    with pytest.raises(InputError) as error:
        load_recipe("recipes/L15.yaml")
    assert str(error.value).startswith(
        "recipes/L15.yaml: no such file, did you mean 'L14'? Shipped recipes: B14, L14, S14"
    )
    Path("folder").mkdir()
    with pytest.raises(InputError, match=r"^folder: is a folder\. Shipped recipes: "):
        load_recipe("folder")


def test_missing_inputs_of_a_shipped_recipe_are_all_named():
    list_line, weights_line = missing_inputs(load_recipe("L14"), "train")
    assert list_line.startswith("data.train.list: not set (")
    assert list_line.endswith("; set data.train.list=PATH")
    assert weights_line.startswith(
        "objective.teacher.weights.checkpoint: weights/InternVideo2-stage2_1b-224p-f4.pt: "
        "no such file (from https://huggingface.co/OpenGVLab/InternVideo2-Stage2_1B-224p-f4, "
        "which is gated: "
    )
    assert weights_line.endswith("; set objective.teacher.weights.checkpoint=PATH")


def test_inputs_that_are_there_are_not_missed():
    write("clips.csv", "a 1\n")
    write("t.pt", "")
    overrides = ["data.train.list=clips.csv", "objective.teacher.weights.checkpoint=t.pt"]
    recipe = load_recipe("L14", overrides)
    assert missing_inputs(recipe, "train") == []
    assert missing_inputs(recipe, "cache-teacher") == []
    recipe = load_recipe("L14", [*overrides, "data.train.prefix=videos"])
    assert missing_inputs(recipe, "train") == [
        "data.train.prefix: videos: no such folder; set data.train.prefix=PATH"
    ]


def test_each_command_misses_what_it_reads():
    recipe = load_recipe(write("r.yaml", CLASSIFY), ["model.weights={checkpoint: w.pt}"])
    keys = {
        verb: [line.split(":")[0] for line in missing_inputs(recipe, verb)]
        for verb in ("train", "evaluate")
    }
    assert keys == {
        "train": [
            "data.train.list", "data.val.list", "data.test.list", "model.weights.checkpoint"
        ],
        "evaluate": ["data.test.list"],
    }  # fmt: skip


def test_without_epochs_only_the_list_of_the_evaluation_is_missed():
    overrides = ["optim.epochs=0", "optim.warmup_epochs=0", "model.weights={checkpoint: w.pt}"]
    recipe = load_recipe(write("r.yaml", CLASSIFY), overrides)
    keys = [line.split(":")[0] for line in missing_inputs(recipe, "train")]
    assert keys == ["data.test.list", "model.weights.checkpoint"]


def test_inputs_of_a_stage_are_named_with_the_stage():
    study = load_recipe(write("r.yaml", STUDY))
    stage = study.stages["finetune"]
    lines = missing_inputs(stage, "train", stage="finetune")
    assert lines[0] == (
        "stages.finetune.data.train.list: train.csv: no such file; "
        "set stages.finetune.data.train.list=PATH"
    )
    assert not any("weights" in line for line in lines)  # another stage makes them


def test_demo_clips_are_not_missed():
    demo = "data.demo={kind: moving-digits, folder: d, train_clips: 2, val_clips: 2, test_clips: 2}"
    assert missing_inputs(load_recipe(write("r.yaml", CLASSIFY), [demo]), "train") == []


def test_cache_of_a_teacher_known_by_hash_needs_neither_teacher_nor_list():
    overrides = ["objective.cache.folder=cache", "objective.cache.teacher_hash=abc"]
    recipe = load_recipe("L14", overrides)
    assert len(missing_inputs(recipe, "train")) == 2
    write("cache/shard.safetensors", "")
    assert missing_inputs(recipe, "train") == []
    assert len(missing_inputs(recipe, "cache-teacher")) == 2


def test_schema_covers_every_key_of_the_shipped_recipes():
    schema = recipe_schema()
    for path in shipped_recipes().values():
        tree = yaml.safe_load(path.read_text())
        assert unknown_to(schema, schema, tree) == [], path
    assert unknown_to(schema, schema, {"optim": {"lrr": 1}}) == ["optim.lrr"]
    assert unknown_to(schema, schema, {"stages": {"a": {"model": {"sise": 1}}}}) == [
        "stages.a.model.sise"
    ]


def test_schema_asks_for_nothing_a_base_may_hold():
    text = str(recipe_schema())
    assert "'required'" not in text
    assert "'oneOf'" not in text
    assert "'additionalProperties': False" in text


def unknown_to(schema: dict, root: dict, value: object, at: str = "") -> list[str]:
    """Dotted paths in `value` for which a JSON schema has no property."""
    if "$ref" in schema:
        return unknown_to(root["$defs"][schema["$ref"].split("/")[-1]], root, value, at)
    if "anyOf" in schema:
        found = [unknown_to(option, root, value, at) for option in schema["anyOf"]]
        return min(found, key=len)
    if not isinstance(value, dict):
        return []
    properties, others = schema.get("properties", {}), schema.get("additionalProperties")
    unknown = []
    for key, below in value.items():
        option = properties.get(key, others)
        if not option:
            unknown.append(f"{at}{key}")
        else:
            unknown += unknown_to(option, root, below, f"{at}{key}.")
    return unknown


def test_recipes_are_frozen():
    recipe = load_recipe(write("r.yaml", DISTILL))
    assert isinstance(recipe, Recipe)
    with pytest.raises(ValueError, match="frozen"):
        recipe.optim.lr = math.pi


def test_path_keys_are_keys_of_the_schema():
    text = str(recipe_schema())
    assert all(f"'{key}': {{" in text for key in recipe_file.PATH_KEYS)
