"""What is installed, what imports what, and whether the README's commands are CI's commands."""

import ast
import configparser
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAYERS = ("kernels", "students", "teachers", "distill")  # each may import itself and its left


def python_files(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def imported_modules(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return names


def layer_of(module: str) -> str | None:
    parts = module.split(".")
    if parts[0] != "distill":
        return None
    return parts[1] if len(parts) > 1 and parts[1] in LAYERS else "distill"


@pytest.mark.parametrize("folder", LAYERS)
def test_imports_point_one_way(folder):
    files = python_files(folder)
    assert files
    allowed = LAYERS[: LAYERS.index(folder) + 1]
    wrong = [
        f"{path.relative_to(ROOT)} imports {module}"
        for path in files
        for module in imported_modules(path)
        # the package itself ("distill") is the root of every absolute import, not a layer
        if module != "distill" and layer_of(module) not in (None, *allowed)
    ]
    assert wrong == []


@pytest.mark.parametrize(
    ("package", "home"),
    [
        ("triton", {"kernels"}),
        ("deepspeed", {"distill/engines/zero.py"}),
        ("decord", {"distill/data/decode.py"}),
        ("onnxruntime", {"distill/use/export.py"}),
        ("huggingface_hub", {"distill/use/model_card.py", "students/hub.py"}),
    ],
)
def test_heavy_packages_are_imported_in_one_place(package, home):
    users = {
        str(path.relative_to(ROOT))
        for folder in LAYERS
        for path in python_files(folder)
        if any(name.split(".")[0] == package for name in imported_modules(path))
    }
    outside = {user for user in users if not any(user.startswith(place) for place in home)}
    assert outside == set()


def test_every_package_folder_is_installed_under_distill():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    packages = setup["options"]["packages"].split()
    folders = {
        "distill." + str(path.parent.relative_to(ROOT)).replace("/", ".").removeprefix("distill.")
        for folder in (*LAYERS, "recipes")
        for path in (ROOT / folder).rglob("__init__.py")
    }
    assert set(packages) == {"distill" if name == "distill.distill" else name for name in folders}
    assert all(name == "distill" or name.startswith("distill.") for name in packages)


def test_every_file_beside_the_code_is_installed():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    patterns = {
        name: value.split() for name, value in setup["options.package_data"].items() if value
    }
    found = []
    for package in setup["options"]["packages"].split():
        parts = package.split(".")
        outer = parts[1] if len(parts) == 2 and parts[1] in (*LAYERS, "recipes") else None
        folder = ROOT / (outer or "/".join(parts))
        inner = {
            ROOT / "/".join(other.split(".")) for other in setup["options"]["packages"].split()
        }
        for path in folder.rglob("*"):
            is_inner = any(
                one != folder and one in path.parents for one in inner if folder in one.parents
            )
            if path.is_file() and path.suffix not in (".py", ".pyc") and not is_inner:
                found.append(path)
                own = path.relative_to(folder)
                assert any(
                    own.match(one) and len(own.parts) == len(Path(one).parts)
                    for one in patterns.get(package, ())
                ), path
    assert len(found) > 100


def readme_commands() -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line.strip()]


def test_ci_runs_the_readme_s_two_commands():
    ci = (ROOT / ".ci/run").read_text().splitlines()
    first, second = readme_commands()[:2]
    assert first == "pip install -e . && distill train recipes/quickstart.yaml"
    assert second == "pip install -e '.[test]' && pytest"
    assert first in ci and second in ci
