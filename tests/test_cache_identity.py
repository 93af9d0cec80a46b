import re

import numpy as np
import pytest

from distill.cache.identity import MEANS, REVISIONS, cache_identity, require_identity
from distill.cache.read import Cache
from distill.cache.shards import Field, ShardWriter
from distill.cache.store import open_folder
from distill.data.index import read_list
from distill.errors import InputError, StateError
from distill.recipe import Recipe
from distill.students.warmstart import file_sha256


def recipe(**changes):
    """A small recipe; `changes` are dotted paths with their values."""
    tree = {
        "name": "tiny",
        "data": {"train": {"list": "train.csv"}, "views": {"frames": 4, "image_size": 56}},
        "model": {"size": "S14"},
        "objective": {
            "kind": "distill",
            "teacher": {"size": "1B", "weights": {"checkpoint": "t.pth", "sha256": "AB12"}},
            "cache": {"folder": "caches/tiny"},
        },
        "optim": {"lr": 1e-3, "batch_size": 8, "epochs": 1},
    }
    for path, value in changes.items():
        *parents, leaf = path.split("__")
        node = tree
        for name in parents:
            node = node.setdefault(name, {})
        node[leaf] = value
    return Recipe.model_validate(tree)


# A changed setting, and what a reader of the unchanged one's cache is told.
SETTINGS = [
    ("data__views__frames", 8, "holds data.views.frames 4, the recipe asks for 8; set data."),
    ("data__views__image_size", 112, "holds data.views.image_size 56, the recipe asks for 112"),
    ("data__views__crop", "center", "holds data.views.crop multiscale, the recipe asks for c"),
    ("data__views__min_area", 0.1, "holds data.views.min_area 0.08, the recipe asks for 0.1;"),
    ("data__views__flip", 0.0, "holds data.views.flip 0.5, the recipe asks for 0.0; set data"),
    ("data__views__never_flip", (), "holds data.views.never_flip [ssv2], the recipe asks for"),
    (
        "data__views__sampling",
        {"kind": "segment"},
        "holds data.views.sampling.kind sparse, the recipe asks for segment; set data.views.s",
    ),
    ("objective__mask__kind", "tube", "holds objective.mask.kind attention, the recipe asks"),
    ("objective__mask__ratio", 0.9, "holds objective.mask.ratio 0.8, the recipe asks for 0.9"),
    ("objective__cache__codes", "fp16", "holds objective.cache.codes 4bit, the recipe asks fo"),
    ("objective__cache__tokens", "all", "holds objective.cache.tokens visible, the recipe as"),
    ("objective__cache__pixels", "full", "holds objective.cache.pixels visible, the recipe a"),
    ("objective__cache__seed", 1, "holds objective.cache.seed 0, the recipe asks for 1; set "),
    ("objective__teacher__size", "6B", "holds objective.teacher.size 1B, the recipe asks for"),
    (
        "objective__teacher__layers",
        7,
        "holds teacher blocks [23,26,29,33,36,39], the recipe asks for [19,23,26,29,33,36,39]; "
        "set objective.cache.f",
    ),
    (
        "objective__teacher__interval",
        2.0,
        "holds teacher blocks [23,26,29,33,36,39], the recipe asks for [29,31,33,35,37,39]; set ",
    ),
    ("objective__teacher__activation", "gelu", "holds objective.teacher.activation gelu_tanh"),
    ("objective__teacher__precision", "bf16", "holds objective.teacher.precision fp32, the r"),
    (
        "objective__cache__teacher_hash",
        "cd34",
        "holds teacher weights (sha256) ab12, the recipe asks for cd34; set objective.cache.f",
    ),
    (
        "data__views__sampling",
        {"kind": "dense", "stride_frames": 2},
        "holds data.views.sampling.kind sparse, the recipe asks for dense; set data.views.samplin",
    ),
]


@pytest.mark.parametrize(("path", "value", "line"), SETTINGS)
def test_every_setting_of_a_record_is_part_of_it(path, value, line):
    found, expected = cache_identity(recipe()), cache_identity(recipe(**{path: value}))
    with pytest.raises(StateError, match=f"^cache c: {re.escape(line)}") as error:
        require_identity(found, expected, where="cache c")
    assert str(error.value).endswith(
        "set objective.cache.folder to a new folder and run 'distill cache-teacher'"
    )
    assert "\n" not in str(error.value)


def test_no_setting_is_without_a_test():
    """Every name in the identity is one that a line above or a revision speaks of."""
    name = r"holds (teacher weights \(sha256\)|teacher blocks|\S+) "
    told = {re.match(name, line)[1] for *_, line in SETTINGS}
    revisions = {f"{name} revision" for name in REVISIONS}
    assert told | revisions == set(cache_identity(recipe()))


@pytest.mark.parametrize(("path", "value", "line"), SETTINGS)
def test_a_reader_with_another_setting_is_told_so(tmp_path, path, value, line):
    """From the recipe to the line, of a cache that has a record of the list's only clip."""
    (tmp_path / "train.csv").write_text("a.mp4,0\n")
    train = {"list": str(tmp_path / "train.csv")}
    ours = recipe(data__train=train, objective__cache__codes="fp16")
    folder = open_folder(tmp_path / "cache")
    settings = {"fields": [Field("x", "uint8", (1,))], "identity": cache_identity(ours)}
    with ShardWriter(folder, shard_bytes=9, shard_seconds=9.0, **settings) as writer:
        for view in range(ours.objective.cache.views):
            writer.add(read_list(ours.data.train)[0].id, view, {"x": np.zeros(1, np.uint8)}, {})
    assert len(Cache.open(folder, ours).rows) == 1
    changes = {"data__train": train, "objective__cache__codes": "fp16", path: value}
    if path == "objective__cache__codes":
        changes[path], line = "4bit", "holds objective.cache.codes fp16, the recipe asks for 4bit;"
    with pytest.raises(StateError, match=f"^cache {folder}: {re.escape(line)}") as error:
        Cache.open(folder, recipe(**changes))
    assert "\n" not in str(error.value)


def test_the_stride_of_dense_sampling_is_part_of_it():
    one, other = (
        cache_identity(recipe(data__views__sampling={"kind": "dense", "stride_frames": stride}))
        for stride in (2, 4)
    )
    line = "c: holds data.views.sampling.stride_frames 2, the recipe asks for 4; set data.views.sam"
    with pytest.raises(StateError, match=f"^{line}"):
        require_identity(one, other, where="c")


def test_other_weights_under_the_same_name_are_refused(tmp_path):
    path = tmp_path / "teacher.safetensors"
    ours = recipe(objective__teacher__weights={"checkpoint": str(path)})
    path.write_bytes(b"weights")
    before = cache_identity(ours)
    path.write_bytes(b"Weights")
    with pytest.raises(StateError, match=r"^c: holds teacher weights .sha256. [0-9a-f]{64}, the r"):
        require_identity(before, cache_identity(ours), where="c")


def test_a_cache_without_a_setting_that_is_asked_for_is_refused():
    """As one from before there was such a setting."""
    ours = cache_identity(recipe())
    old = {name: value for name, value in ours.items() if name != "objective.cache.tokens"}
    line = (
        "c: holds objective.cache.tokens none, the recipe asks for visible; set objective.cache.f"
    )
    with pytest.raises(StateError, match=f"^{line}"):
        require_identity(old, ours, where="c")


@pytest.mark.parametrize("revision", sorted(REVISIONS))
def test_every_revision_is_part_of_it(revision, monkeypatch):
    found = cache_identity(recipe())
    line = f"cache c: holds {revision} revision {REVISIONS[revision]}, the recipe asks for 99; set"
    monkeypatch.setitem(REVISIONS, revision, 99)
    with pytest.raises(StateError, match=line):
        require_identity(found, cache_identity(recipe()), where="cache c")


@pytest.mark.parametrize("codes", ["fp16", "8bit", "4bit", "3bit", "2bit"])
def test_codes_are_named_by_their_kind(codes):
    assert cache_identity(recipe(objective__cache__codes=codes))["objective.cache.codes"] == codes


@pytest.mark.parametrize(
    ("expected", "line"),
    [
        ({MEANS: "cd34"}, "means.safetensors holds cd34"),
        ({}, "means.safetensors is not there"),
    ],
)
def test_codes_with_other_means_are_refused(expected, line):
    message = (
        f"cache c: its codes need the means ab12, but {line}; put that file back, or delete the "
        "folder and run 'distill cache-teacher' again"
    )
    ours = cache_identity(recipe())
    with pytest.raises(StateError, match=f"^{re.escape(message)}$"):
        require_identity({**ours, MEANS: "ab12"}, {**ours, **expected}, where="cache c")


def test_a_setting_that_differs_is_named_before_the_means():
    found = {MEANS: "ab12", **cache_identity(recipe())}
    with pytest.raises(StateError, match="holds objective.cache.codes 4bit, the recipe asks for 8"):
        require_identity(found, cache_identity(recipe(objective__cache__codes="8bit")), where="c")


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("run__seed", 7),
        ("data__views__decoder", "pyav"),
        ("data__workers", 5),
        ("data__train__list", "other.csv"),
        ("model__size", "L14"),
        ("optim__batch_size", 4),
        ("objective__decoder", "linear"),
        ("objective__cache__views", 2),
        ("objective__cache__folder", "elsewhere"),
        ("objective__cache__shard_mb", 1),
        ("objective__cache__batch_size", 1),
    ],
)
def test_what_does_not_change_a_record_is_not(path, value):
    assert cache_identity(recipe(**{path: value})) == cache_identity(recipe())


def test_a_size_spelt_out_is_the_size_by_name():
    spelt = {"width": 1408, "depth": 40, "heads": 16, "mlp_ratio": 48 / 11}
    assert cache_identity(recipe(objective__teacher__size=spelt)) == cache_identity(recipe())
    own = cache_identity(recipe(objective__teacher__size={**spelt, "depth": 30}))
    assert own["objective.teacher.size"].startswith("1408x30x16, mlp_ratio 4.36")


def test_teacher_is_known_by_its_files_contents(tmp_path):
    path = tmp_path / "teacher.safetensors"
    path.write_bytes(b"weights")
    weights = {"checkpoint": str(path)}
    identity = cache_identity(recipe(objective__teacher__weights=weights))
    assert identity["teacher weights (sha256)"] == file_sha256(path)
    weights["checkpoint"] = str(tmp_path / "gone.pth")
    with pytest.raises(InputError, match=r"gone.pth: no such file; .* objective.cache.teacher_h"):
        cache_identity(recipe(objective__teacher__weights=weights))
    known = recipe(objective__teacher__weights=weights, objective__cache__teacher_hash="AB12")
    assert cache_identity(known)["teacher weights (sha256)"] == "ab12"


def test_a_random_teacher_is_known_by_its_seed():
    settings = {"size": "1B", "random": True}
    identity = cache_identity(recipe(objective__teacher=settings, run__seed=3))
    assert identity["teacher weights (sha256)"] == "random, seed 3"
    settings["positions"] = "separable"
    identity = cache_identity(recipe(objective__teacher=settings, run__seed=3))
    assert identity["teacher weights (sha256)"] == "random, seed 3, separable positions"


def test_a_recipe_without_a_cache_is_told_so():
    with pytest.raises(InputError, match="recipe tiny: no view cache; give it objective.kind"):
        cache_identity(recipe(objective__cache=None))
