"""The shell: every command's help has examples that parse, and words are completed."""

import os
import re
import shlex
import subprocess
import sys

import pytest
import typer
from typer.testing import CliRunner

from distill.cli import app
from distill.recipe_file import load_recipe


def leaves(command, path=()) -> dict[tuple[str, ...], object]:
    """Every command by the words that name it."""
    below = getattr(command, "commands", None)
    if below is None:
        return {path: command}
    return {
        words: leaf
        for name, one in below.items()
        for words, leaf in leaves(one, (*path, name)).items()
    }


COMMANDS = leaves(typer.main.get_command(app))


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_help_of_a_command_has_an_example_that_parses(path):
    command = COMMANDS[path]
    examples = re.findall(r"^    (distill .+)$", command.help, re.MULTILINE)
    assert 1 <= len(examples) <= 4
    for example in examples:
        words = shlex.split(example.partition(" > ")[0])
        assert tuple(words[1 : 1 + len(path)]) == path
        parsed = command.make_context("distill", words[1 + len(path) :]).params
        recipe = parsed.get("recipe")
        if recipe:
            load_recipe(recipe, parsed.get("overrides") or ())
    shown = CliRunner().invoke(app, [*path, "--help"], env={"COLUMNS": "120"})
    assert shown.exit_code == 0
    assert set(examples) <= {line.strip() for line in shown.output.splitlines()}


def test_a_shell_completes_commands_and_options():
    for typed, wanted in (("distill cac", "cache-teacher"), ("distill evaluate --sc", "--scores")):
        environment = {
            **os.environ,
            "_DISTILL_COMPLETE": "complete_bash",
            "COMP_WORDS": typed,
            "COMP_CWORD": str(len(typed.split()) - 1),
        }
        code = "from distill.cli import app; app(prog_name='distill')"
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True
        )
        assert wanted in done.stdout.split(), done.stderr
