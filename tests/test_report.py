"""Pages about runs and caches: what is in them, and what a real browser makes of them."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from playwright.sync_api import sync_playwright
from tiny_runs import CLASSES, TRAIN_CLIPS, VAL_CLIPS, classify, distil, write_clips
from typer.testing import CliRunner

from distill.cli import app
from distill.job import WATCHED_CLIPS
from distill.report import figures
from distill.report.gather import find_runs, read_run
from distill.report.page import differing_settings, short_names, write_report
from distill.train import train

FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
FLAGS += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
ATTACK = "<img src=x onerror=\"document.title='taken'\">"  # in all that a user may name
CLIP = f"{ATTACK.replace(chr(34), '')}.mp4"
NAMES = ("</script><script>document.title='taken'</script>", "a & b", "<b>bold")


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> Path:
    """A folder with a distilled run, a finetuned one and a sweep of probes, of odd names."""
    videos = write_clips(tmp_path_factory.mktemp("videos"))
    (videos / "10.mp4").rename(videos / CLIP)
    (videos / "13.mp4").write_bytes(b"no video")
    listed = (videos / "val.csv").read_text().replace("10.mp4", CLIP)
    (videos / "val.csv").write_text(listed)
    folder = tmp_path_factory.mktemp("study")
    train(distil(videos, "cached", name=ATTACK), folder / "distilled")
    labelled = {"objective__class_names": NAMES, "evaluate__clips": 1, "optim__epochs": 1}
    train(classify(videos, **labelled), folder / "finetuned")
    probes = {
        "objective__trainable": "head",
        "objective__sweep": {"lrs": [1e-3, 1e-2]},
        "model__drop_path": 0.0,
        "optim__layer_decay": 1.0,
        "optim__clip_grad": None,
    }
    train(classify(videos, **labelled, **probes), folder / "probes")
    return folder


@pytest.fixture(scope="module")
def pages(study, tmp_path_factory) -> dict[str, Path]:
    """The study's page, one of each run, and that of the cache."""
    folder = tmp_path_factory.mktemp("pages")
    runner, found = CliRunner(), {}
    for name in ("distilled", "finetuned", "probes"):
        found[name] = folder / f"{name}.html"
        result = runner.invoke(app, ["report", str(study / name), "--output", str(found[name])])
        assert result.exit_code == 0, result.output
        assert str(found[name]) in result.output.replace("\n", "")
    found["study"] = write_report([study], folder / "study.html")
    found["cache"] = folder / "cache.html"
    cache = read_run(study / "distilled", name="").recipe.objective.cache.folder
    result = runner.invoke(app, ["cache", "inspect", cache, "--html", str(found["cache"])])
    assert result.exit_code == 0, result.output
    return found


@pytest.fixture(scope="module")
def chromium():
    path = shutil.which("chromium") or shutil.which("google-chrome")
    if path is None:
        pytest.fail("there is no chromium to look at pages with: apt-get install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()


class Look:
    """A page as a browser shows it, and what the browser said and asked for."""

    def __init__(self, chromium, path: Path, *, scheme: str = "light", width: int = 1180) -> None:
        self.said: list[str] = []
        self.asked: list[str] = []
        self.page = chromium.new_page(color_scheme=scheme, viewport={"width": width, "height": 844})
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(path.as_uri())
        self.page.eval_on_selector_all("details.run", "all => all.forEach(one => one.open = true)")
        # Plots are drawn when the event of opening comes.
        self.page.wait_for_function(
            "[...document.querySelectorAll('.canvas')].every(one => one.querySelector('svg'))"
        )

    def count(self, selector: str) -> int:
        return self.page.locator(selector).count()

    def overflow(self) -> int:
        """Pixels by which the page is wider than the window."""
        return self.page.evaluate("document.documentElement.scrollWidth - innerWidth")


def drawings(path: Path) -> dict[str, int]:
    """How many traces of each kind a page's figures have, by what Plotly calls their elements."""
    found = {"scatterlayer": 0, "barlayer": 0, "heatmaplayer": 0}
    pattern = r'<script type="application/json">(.*?)</script>'
    for text in re.findall(pattern, path.read_text(), re.DOTALL):
        for trace in json.loads(text)["data"]:
            found[f"{trace['type']}layer"] += 1
    return found


@pytest.mark.parametrize("name", ["distilled", "finetuned", "probes", "study", "cache"])
@pytest.mark.parametrize(("scheme", "width"), [("light", 1180), ("dark", 390)])
def test_a_browser_draws_all_of_a_page(pages, chromium, name, scheme, width):
    look = Look(chromium, pages[name], scheme=scheme, width=width)
    expected = drawings(pages[name])
    assert expected["scatterlayer"] > 0
    found = {
        "scatterlayer": look.count(".scatterlayer .trace"),
        "barlayer": look.count(".barlayer .trace"),
        "heatmaplayer": look.count(".heatmaplayer .hm"),
    }
    assert found == expected
    assert look.said == []
    assert look.asked == [pages[name].as_uri()] + [
        url for url in look.asked[1:] if url.startswith(("data:", "blob:"))
    ]
    assert look.overflow() <= 0
    sizes = look.page.eval_on_selector_all("img", "all => all.map(one => one.naturalWidth)")
    assert all(size > 0 for size in sizes)
    look.page.close()


def test_colours_follow_the_scheme(pages, chromium):
    seen = {}
    for scheme in ("light", "dark"):
        look = Look(chromium, pages["distilled"], scheme=scheme)
        seen[scheme] = look.page.evaluate(
            "[getComputedStyle(document.body).backgroundColor, getComputedStyle(document"
            ".querySelector('.scatterlayer path.js-line')).stroke]"
        )
        look.page.emulate_media(color_scheme="dark")
        if scheme == "light":  # an open page follows too
            look.page.wait_for_timeout(200)
            after = look.page.evaluate(
                "getComputedStyle(document.querySelector('.scatterlayer path.js-line')).stroke"
            )
        look.page.close()
    assert seen["light"][0] != seen["dark"][0]
    assert seen["light"][1] != seen["dark"][1] == after


@pytest.mark.parametrize("name", ["distilled", "finetuned", "study"])
def test_names_are_text_whatever_they_say(pages, chromium, name):
    look = Look(chromium, pages[name])
    assert look.page.title().endswith("· distill")
    assert look.count("img[src=x]") == 0
    if name != "distilled":
        assert CLIP in look.page.locator(".clip .path").all_inner_texts()
        assert NAMES[0] in " ".join(look.page.locator(".clip b").all_inner_texts())
    if name != "finetuned":
        recipe = look.page.locator("pre").first.text_content()
        assert "onerror=" in recipe and "document.title" in recipe
    look.page.close()


def test_a_page_says_what_came_out(study, pages, chromium):
    result = json.loads((study / "finetuned" / "evaluation.json").read_text())
    look = Look(chromium, pages["finetuned"])
    rows = look.page.locator("table.numbers").first.locator("tbody tr").all_inner_texts()
    low, high = result["confidence_intervals"]["top1"]
    cells = rows[0].split("\t")
    assert cells[:3] == ["Top-1", f"{result['top1']:.2f} %", f"{low:.2f} to {high:.2f}"]
    assert cells[3] == f"{result['top1_of_read']:.2f} %"
    assert "1 clips could not be read" in look.page.locator("main").inner_text()
    shown = look.count("figure.clip img")
    assert shown == VAL_CLIPS - 1  # all that can be decoded are mistakes or hard
    wide = look.page.locator("figure.clip img").first.evaluate("one => one.naturalWidth")
    assert wide == 2 * 112 + 3  # two frames
    look.page.close()


def test_a_distillation_s_page_shows_clips_patch_by_patch(study, pages, chromium):
    watched = json.loads((study / "distilled" / "watched" / "watched.json").read_text())
    assert len(watched["clips"]) == WATCHED_CLIPS < TRAIN_CLIPS
    look = Look(chromium, pages["distilled"])
    assert look.count("figure.watched") == 4
    assert look.count("figure.watched img") == 4 * 5
    cosines = [float(text) for text in look.page.locator("figure.watched b").all_inner_texts()]
    assert cosines == sorted(cosines)
    assert cosines[0] == pytest.approx(min(c["cosine"] for c in watched["clips"][:4]), abs=1e-3)
    text = look.page.locator("main").inner_text()
    for words in ("Spread over tokens", "Gradient norm", "Learning rate", "Throughput", "Versions"):
        assert words in text
    look.page.close()


def test_a_sweep_s_settings_are_listed_with_the_chosen_one(study, pages):
    text = pages["probes"].read_text()
    assert "Settings of the sweep" in text and text.count('<tr class="chosen">') == 1
    assert "sweep of linear probes" in text


def test_the_cache_s_page_has_its_views_and_layers(pages, chromium):
    look = Look(chromium, pages["cache"])
    assert look.count("figure.watched") == 6
    text = look.page.locator("main").inner_text()
    for words in (f"clips\n{TRAIN_CLIPS}\n", "Norm of what the mean leaves", "Visible patches"):
        assert words in text
    look.page.close()


def test_runs_side_by_side_have_a_row_each_and_what_differs(study, pages):
    folders = find_runs([study])
    assert [folder.name for folder in folders] == ["distilled", "finetuned", "probes"]
    text = pages["study"].read_text()
    assert all(f'<a href="#run-{number}">' in text for number in (1, 2, 3))
    runs = [read_run(folder, name=folder.name) for folder in folders[1:]]
    assert ("objective.trainable", ["", "head"]) in differing_settings(runs)
    assert "run.seed" not in dict(differing_settings(runs))


def test_pieces_may_be_missing(study, tmp_path):
    """A run that has only begun, one whose files are damaged, and one whose videos are gone."""
    begun = tmp_path / "begun"
    begun.mkdir()
    lines = (study / "distilled" / "metrics.jsonl").read_text().splitlines()
    (begun / "metrics.jsonl").write_text("\n".join(lines[:2]) + '\n{"step": 3, "lo')
    page = write_report([begun])
    assert page == begun / "report.html"
    assert "not finished: at step 2" in page.read_text()

    scored = tmp_path / "scored"  # as `distill evaluate --folder` leaves it
    scored.mkdir()
    for name in ("evaluation.json", "scores.safetensors"):
        shutil.copy(study / "finetuned" / name, scored)
    text = write_report([scored]).read_text()
    assert "Most confident mistakes" in text and "its video is not in a list" in text

    damaged = tmp_path / "damaged"
    shutil.copytree(study / "finetuned", damaged)
    (damaged / "summary.json").write_text("{")
    (damaged / "scores.safetensors").write_bytes(b"nothing")
    recipe = (damaged / "recipe.yaml").read_text()
    (damaged / "recipe.yaml").write_text(recipe + "unheard_of: 1\n")
    (damaged / "quarantine.jsonl").write_text("what\n")
    text = write_report([damaged]).read_text()
    for note in (
        "summary.json cannot be read",
        "scores.safetensors: cannot be read",
        "unheard_of",
        "quarantine.jsonl",
    ):
        assert note in text

    moved = tmp_path / "moved"
    shutil.copytree(study / "finetuned", moved)
    recipe = (moved / "recipe.yaml").read_text()
    (moved / "recipe.yaml").write_text(recipe.replace("val.csv", "gone.csv"))
    text = write_report([moved]).read_text()
    assert "No filmstrips" in text and "gone.csv: no such list file" in text
    assert text.count('class="none">No frames') == VAL_CLIPS - 1


def test_quarantined_clips_are_listed(study, tmp_path):
    shutil.copytree(study / "distilled", tmp_path / "run")
    entry = {"id": 5, "name": "v/<9>.mp4", "path": "v/9.mp4", "line": 7, "reason": "empty <file>"}
    (tmp_path / "run" / "quarantine.jsonl").write_text(json.dumps(entry) + "\n")
    text = write_report([tmp_path / "run"]).read_text()
    assert "v/&lt;9&gt;.mp4" in text and "empty &lt;file&gt;" in text


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["nowhere"], "nowhere: no such folder; give the run.folder of a recipe"),
        (["."], "no run there, nor in the folders in it"),
        (["{run}", "--output", "page.txt"], "page.txt: a page is HTML; give it a name that ends"),
        (["{run}", "--output", "no/such/page.html"], "cannot be written (No such file or dir"),
    ],
)
def test_what_cannot_be_is_one_line(study, tmp_path, monkeypatch, arguments, line):
    monkeypatch.chdir(tmp_path)
    run = str(study / "probes")
    result = CliRunner().invoke(app, ["report", *(one.format(run=run) for one in arguments)])
    assert result.exit_code == 2
    assert line in result.output and result.output.count("\n") == 1


def test_runs_are_called_by_what_tells_them_apart():
    paths = [Path("/a/S14/seed0"), Path("/a/B14/seed0"), Path("/a/B14/seed1")]
    assert short_names(paths) == ["S14/seed0", "B14/seed0", "B14/seed1"]
    assert short_names(paths[:1]) == ["seed0"]


def test_long_curves_are_thinned_and_keep_their_end():
    lines = [{"step": step, "loss": float(step)} for step in range(100_001)]
    trace = figures.curve(lines, "loss")
    assert len(trace["x"]) <= figures.MOST_POINTS + 1
    assert (trace["x"][0], trace["x"][-1]) == (0, 100_000)


def test_many_classes_are_cut_to_the_worst_and_have_no_map():
    count = figures.MOST_CONFUSED + 1
    rows = [{"class": n, "clips": 2, "top1": float(n % 100), "ap": 0.0} for n in range(count)]
    names = [str(number) for number in range(count)]
    found = figures.class_figure(rows, names)
    assert len(found["data"][0]["x"]) == figures.MOST_CLASSES
    assert found["data"][0]["x"][:3] == ["0", "100", "200"]
    assert figures.confusion_figure(np.zeros((count, count + 1), int), names) is None
    assert CLASSES < figures.MOST_CLASSES
