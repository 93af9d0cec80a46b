"""The commands of docs/cluster.md: programs, options, recipes and settings that there are."""

import re
import shlex
from pathlib import Path

import pytest
import typer
from torch.distributed.run import get_args_parser

from distill.cli import app
from distill.recipe_file import load_recipe

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs/cluster.md").read_text()
BLOCKS = re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)
COMMANDS = [line for block in BLOCKS for line in block.splitlines()]
WORDS = re.findall(r"`(distill [^`]+)`", PAGE)


def distill_arguments(command: str) -> list[str]:
    """What follows `distill`, however it is started."""
    program, *rest = shlex.split(command)
    if program == "torchrun":
        parsed = get_args_parser().parse_args(rest)  # ends the test at an option that is none
        assert parsed.module and parsed.training_script == "distill"
        return parsed.training_script_args
    if program == "sbatch":
        script = (ROOT / rest[0]).read_text()
        assert re.search(r'^srun .*distill train "\$@"$', script, re.MULTILINE)
        return ["train", *rest[1:]]
    if program == "srun":
        return rest[rest.index("distill") + 1 :]
    assert program == "distill"
    return rest


@pytest.mark.parametrize("command", [*COMMANDS, *WORDS])
def test_a_command_of_the_page_is_one_that_runs(command):
    verb, *arguments = distill_arguments(command)
    subcommand = typer.main.get_command(app).commands[verb]
    parsed = subcommand.make_context(verb, arguments).params
    assert load_recipe(parsed["recipe"], parsed["overrides"] or ()).run.folder


def test_the_page_has_a_command_of_every_kind():
    kinds = [line.split()[0] for line in COMMANDS]
    assert (len(kinds), sorted(set(kinds))) == (7, ["distill", "sbatch", "srun", "torchrun"])


def test_the_page_and_the_script_wait_for_the_same_time():
    (seconds,) = re.findall(r"^#SBATCH --signal=USR1@(\d+)$", script(), re.MULTILINE)
    assert f"sbatch --signal=USR1@{seconds}" in PAGE
    assert f"{seconds} seconds there" in PAGE


def script() -> str:
    return (ROOT / "docs/slurm.sbatch").read_text()
