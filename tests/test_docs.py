"""README, CONTRIBUTING and docs/: commands and code that run, messages that there are, a site."""

import ast
import configparser
import re
import runpy
import shlex
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import typer
import yaml
from mkdocs.commands.build import build
from mkdocs.config import load_config
from pydantic import BaseModel
from torch.distributed.run import get_args_parser
from typer.testing import CliRunner

from distill import recipe as schema
from distill.cli import app
from distill.recipe_file import load_recipe, shipped_recipes
from distill.students.vit import SIZES, ViTSize
from distill.teachers import create_teacher
from distill.zoo import zoo_rows

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXT = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in PAGES}
PLACEHOLDER = re.compile(r"\b[A-Z]{2,}\b")  # distill train RECIPE
QUICK = ("zoo", "schema")  # commands of pages that are run, and not only read
EXTRAS = configparser.ConfigParser()
EXTRAS.read(ROOT / "setup.cfg")


def fenced(kind: str) -> list[tuple[str, str]]:
    """Page and content of every block of a language."""
    pattern = re.compile(rf"^```{kind}\n(.*?)^```", re.DOTALL | re.MULTILINE)
    return [(page, block) for page, text in TEXT.items() for block in pattern.findall(text)]


def lines_of(block: str) -> list[str]:
    joined = block.replace("\\\n", " ")
    return [line.strip() for line in joined.splitlines() if line.strip()]


def all_commands() -> list[tuple[str, str]]:
    found = [(page, line) for page, block in fenced("bash") for line in lines_of(block)]
    for page, text in TEXT.items():
        found += [
            (page, line)
            for line in lines_of(text)
            if line.startswith("distill ") and f"\n    {line.split('  ')[0]}" in text
        ]
        prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
        found += [
            (page, " ".join(word.split())) for word in re.findall(r"`(distill [^`]+)`", prose)
        ]
        found += [(page, " ".join(w.split())) for w in re.findall(r"`(torchrun [^`]+)`", prose)]
    return list(dict.fromkeys(found))


COMMANDS = all_commands()


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with the recipes that pages write out."""
    monkeypatch.chdir(tmp_path)
    for _, block in fenced("yaml"):
        name = re.match(r"# ([\w.]+\.yaml)\n", block)
        if name:
            Path(name[1]).write_text(block)


def distill_arguments(words: list[str]) -> list[str]:
    """What follows `distill`, however it is started."""
    program, *rest = words
    if program == "torchrun":
        parsed = get_args_parser().parse_args(rest)  # ends the test at an option that is none
        assert parsed.module and parsed.training_script == "distill"
        return parsed.training_script_args
    if program == "deepspeed":
        from deepspeed.launcher.runner import parse_args

        parsed = parse_args(rest)
        assert parsed.module and parsed.no_local_rank and parsed.user_script == "distill"
        return parsed.user_args
    if program == "sbatch":
        script = (ROOT / rest[0]).read_text()
        assert re.search(r'^srun .*distill train "\$@"$', script, re.MULTILINE)
        return ["train", *rest[1:]]
    if program == "srun":
        return rest[rest.index("distill") + 1 :]
    assert program == "distill"
    return rest


def check_distill(words: list[str]) -> None:
    """The command line takes it, and its recipe and settings are such that there are."""
    arguments, command = distill_arguments(words), typer.main.get_command(app)
    if arguments[0].startswith("-") or PLACEHOLDER.fullmatch(arguments[0]):
        known = {option for parameter in command.params for option in parameter.opts}
        assert arguments[0] in {*known, "--help", "COMMAND"}
        return
    while hasattr(command, "commands") and arguments:
        verb, *arguments = arguments
        assert verb in command.commands, f"no command {verb}"
        command = command.commands[verb]
    if not arguments or hasattr(command, "commands") or arguments == ["--help"]:
        return  # `distill train`, the command as such
    parsed = command.make_context("distill", list(arguments)).params
    recipe, overrides = parsed.get("recipe"), parsed.get("overrides") or ()
    if recipe and PLACEHOLDER.fullmatch(recipe):
        recipe = "quickstart"
    if recipe and not recipe.startswith("runs/"):  # which a run writes
        load_recipe(recipe, overrides)


@pytest.mark.parametrize(("page", "command"), COMMANDS)
def test_a_command_of_a_page_is_one_that_runs(page, command, here):
    for part in command.split(" && "):
        program, *rest = words = shlex.split(part, comments=True)
        if "..." in part or PLACEHOLDER.fullmatch(program):
            continue  # prose that leaves something out
        if program in ("distill", "torchrun", "deepspeed", "srun", "sbatch"):
            check_distill(words)
        elif program == "pip":
            for extra in re.findall(r"\[([\w,]+)\]", part):
                assert set(extra.split(",")) <= set(EXTRAS["options.extras_require"])
        elif program == "pytest":
            paths = [word for word in rest if "/" in word]
            assert all((ROOT / path).exists() for path in paths)
        elif program == "python":
            assert rest[0] == "-m" and find_spec(rest[1])
        elif program == "hf":
            files = {row.file for row in zoo_rows()}
            sources = "".join(path.read_text() for path in shipped_recipes().values())
            assert rest[0] == "download" and f"hf download {rest[1]}" in " ".join(sources.split())
            assert rest[2].startswith("--") or rest[2] in files
        else:
            assert program in ("ruff", "mkdocs"), f"nobody knows {program}"


@pytest.mark.parametrize(
    "command", sorted({c for _, c in COMMANDS if c.split()[1:2] and c.split()[1] in QUICK})
)
def test_quick_commands_of_pages_run(command, here):
    words = shlex.split(command, comments=True)[1:]
    if "--check" not in words:
        assert CliRunner().invoke(app, words).exit_code == 0


def test_pages_have_commands_of_every_kind():
    programs = {command.split()[0] for _, command in COMMANDS}
    assert {"distill", "torchrun", "srun", "sbatch", "pip", "pytest", "hf"} <= programs
    pages = {page for page, _ in COMMANDS}
    assert {"README.md", "docs/own_videos.md", "docs/choosing.md", "docs/cluster.md"} <= pages
    assert len(COMMANDS) > 70


@pytest.mark.parametrize(("page", "block"), fenced("yaml"))
def test_a_recipe_of_a_page_loads(page, block, here):
    path = Path(re.match(r"# ([\w.]+\.yaml)\n", block)[1])
    assert yaml.safe_load(block)["base"]
    assert load_recipe(path).name == path.stem


@pytest.fixture
def small_teacher(here, monkeypatch):
    """The 1B with its depth and little width, and a file with its weights."""
    monkeypatch.setitem(SIZES, "1B", ViTSize(32, 40, 2, pooled_width=16))
    teacher = create_teacher("1B", random=True)
    torch.save(teacher.state_dict(), "InternVideo2-stage2_1b-224p-f4.pt")


@pytest.mark.parametrize(
    ("page", "block"),
    [pair for pair in fenced("python") if pair[0] in ("README.md", "docs/adding_a_student.md")]
    + [pair for pair in fenced("python") if pair[0] == "docs/adding_a_teacher.md"],
)
def test_code_of_a_page_runs(page, block, small_teacher):
    Path("code.py").write_text(block)
    found = runpy.run_path("code.py")
    if page == "README.md":
        assert found["features"].middle.shape == (6, 1, 2049, 32)
        assert "6 layers, 1 clip, 2049 tokens, 1408 channels" in block
        assert sum(p.numel() for p in found["student"].parameters()) // 10**6 == 29


def templates() -> list[str]:
    """Every text of the code, `...` where something is filled in."""

    def text(node: ast.AST) -> str:
        match node:
            case ast.Constant(value=str(value)):
                return value
            case ast.JoinedStr(values=parts):
                return "".join(map(text, parts))
            case ast.BinOp(left=left, op=ast.Add(), right=right):
                return text(left) + text(right)
        return "..."

    return [
        text(node)
        for folder in ("distill", "students", "teachers", "kernels")
        for path in (ROOT / folder).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, (ast.Constant, ast.JoinedStr, ast.BinOp))
    ]


def test_messages_of_troubleshooting_are_those_of_the_code():
    page, known = TEXT["docs/troubleshooting.md"], templates()
    messages = [match[2] for match in re.finditer(r"^#### (``?)(.+)\1$", page, re.MULTILINE)]
    assert len(messages) > 30
    for message in messages:
        parts = message.split("...")
        assert sum(map(len, parts)) > 10, f"{message}: fits anything"
        pattern = re.compile(".*".join(map(re.escape, parts)), re.DOTALL)
        assert any(map(pattern.search, known)), f"no such message: {message}"


def sections() -> set[type[BaseModel]]:
    found = {
        one
        for one in vars(schema).values()
        if isinstance(one, type) and issubclass(one, schema.Section)
    }
    return found - {schema.Section, schema.Study, schema.Students}


def test_the_site_builds_and_holds_what_is_made_from_the_code(tmp_path, monkeypatch):
    monkeypatch.setenv("NO_MKDOCS_2_WARNING", "1")
    config = load_config(str(ROOT / "mkdocs.yml"), strict=True, site_dir=str(tmp_path / "site"))
    build(config)  # ends with an error at a link that leads nowhere
    page = {
        name: (tmp_path / "site" / name / "index.html").read_text()
        for name in ("recipe", "zoo", "commands", "troubleshooting", "benchmarks/results/kernels")
    }
    wanted = {field for section in sections() for field in section.model_fields}
    assert {name for name in wanted if f"<code>{name}</code>" not in page["recipe"]} == set()
    for section in sections():
        for field in section.model_fields.values():
            plain = re.split(r"[`'&<>\"]", field.description or "")[0]  # what HTML leaves as it is
            assert plain in page["recipe"]
    assert page["zoo"].count("/resolve/main/") >= sum(row.file is not None for row in zoo_rows())
    for verb in ("train", "cache-teacher", "evaluate", "cache-inspect", "cache-verify"):
        assert f'id="distill-{verb}"' in page["commands"]
    index = (tmp_path / "site/index.html").read_text()
    assert 'href="benchmarks/results/cached_vs_online/"' in index and 'href="cluster/"' in index
    assert "https://fonts" not in index  # the site fetches nothing from elsewhere
    assert (tmp_path / "site/slurm.sbatch").exists()
    assert not (tmp_path / "site/hooks.py").exists()


def test_every_page_is_in_the_navigation():
    nav = re.findall(r"^ +- [^:\n]+: (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    pages = [page.removeprefix("docs/") for page in TEXT if page not in ("README.md",)]
    assert set(pages) <= set(nav) and len(nav) == len(set(nav))


def test_citation_and_changelog_are_of_this_version():
    version = EXTRAS["metadata"]["version"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert (citation["cff-version"], citation["version"]) == ("1.2.0", version)
    assert {"message", "title", "authors"} <= citation.keys()
    assert citation["license"] == EXTRAS["metadata"]["license"]
    assert "arXiv:2403.15377" in str(citation["references"])
    headings = re.findall(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert version in headings[0]
