"""What mkdocs does for the site beside its own work: files of the repository, generated tables.

- README.md is the site's first page, and whatever a page links to in the repository comes along.
- `<!-- recipe -->`, `<!-- zoo -->` and `<!-- commands -->` in a page become the tables of the
  recipe schema, of the published numbers and of the command line, made anew at every build.
"""

import re
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import typer
from mkdocs.structure.files import File, Files

from distill.cli import app
from distill.recipe import Recipe
from distill.zoo import zoo_markdown, zoo_rows

ROOT = Path(__file__).parent.parent
LINK = re.compile(r"(?<=\]\()(?!https?:|mailto:|#)([^)\s#]+)")
# Pages of the site that lie in the repository's root.
FROM_ROOT = {"index.md": "README.md", "CONTRIBUTING.md": "CONTRIBUTING.md"} | {
    "CHANGELOG.md": "CHANGELOG.md"
}
ALWAYS = [path.relative_to(ROOT).as_posix() for path in sorted((ROOT / "recipes").rglob("*.yaml"))]


def on_files(files: Files, config: Any) -> Files:
    """Add the pages of the root, and what any page links to outside of docs/."""
    waiting = [f"docs/{file.src_uri}" for file in files.documentation_pages()]
    waiting += [*FROM_ROOT.values(), "benchmarks/README.md", *ALWAYS]
    seen: set[str] = set()
    while waiting:
        source = waiting.pop()
        if source in seen or not (ROOT / source).is_file():
            continue  # of a link that leads nowhere the strict build tells
        seen.add(source)
        if not source.startswith("docs/"):
            uri = next((uri for uri, root in FROM_ROOT.items() if root == source), source)
            files.append(File.generated(config, uri, abs_src_path=str(ROOT / source)))
        if source.endswith(".md"):
            text = (ROOT / source).read_text(encoding="utf-8")
            waiting += [_resolve(source, link) for link in LINK.findall(text)]
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links as they lead on the site, and the tables in place of their marks."""
    uri = page.file.src_uri
    if uri in FROM_ROOT:
        markdown = LINK.sub(lambda link: link[1].removeprefix("docs/"), markdown)
    elif (ROOT / "docs" / uri).is_file():
        markdown = LINK.sub(lambda link: link[1].removeprefix("../"), markdown)
    return fill(markdown)


def fill(markdown: str) -> str:
    """The page with its tables."""
    for mark, make in TABLES.items():
        if f"<!-- {mark} -->" in markdown:
            markdown = markdown.replace(f"<!-- {mark} -->", make())
    return markdown


def _resolve(source: str, link: str) -> str:
    parts: list[str] = []
    for part in (PurePosixPath(source).parent / link).parts:
        parts = parts[:-1] if part == ".." else [*parts, part]
    return "/".join(parts)


def recipe_tables() -> str:
    """A table of each section of the schema, under the places where a recipe has it."""
    schema = Recipe.model_json_schema()
    places: dict[str, list[str]] = {"": [""]}
    _place(schema, "", defs=schema["$defs"], places=places)
    parts = []
    for name, paths in places.items():
        section = schema["$defs"][name] if name else schema
        kind = section["properties"].get("kind", {}).get("const")
        title = ", ".join(f"`{path}`" for path in paths if path) or "A recipe"
        lines = [f"## {title}{f', kind `{kind}`' if kind else ''}", ""]
        if name:
            lines += [section.get("description", "").partition("\n\n")[0], ""]
        lines += ["| key | values | when not given | |", "|---|---|---|---|"]
        for key, node in section["properties"].items():
            default = "*required*" if key in section.get("required", ()) else _value(node)
            text = node.get("description", "")
            lines.append(f"| `{key}` | {_values(node, schema['$defs'])} | {default} | {text} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _place(section: dict, path: str, *, defs: dict, places: dict[str, list[str]]) -> None:
    """Note every section below `path`, by its name in the schema."""
    for key, node in section["properties"].items():
        for name, below in _references(node):
            where = f"{path}.{key}{below}".lstrip(".")
            if where not in places.setdefault(name, []):
                places[name].append(where)
                _place(defs[name], where, defs=defs, places=places)


def _references(node: Any, below: str = "") -> Iterator[tuple[str, str]]:
    """Sections that a field holds; those by name stand one deeper."""
    if isinstance(node, dict):
        if "$ref" in node:
            yield node["$ref"].rpartition("/")[2], below
        for key, part in node.items():
            if key != "discriminator":
                yield from _references(part, ".NAME" if key == "additionalProperties" else below)
    elif isinstance(node, list):
        for part in node:
            yield from _references(part, below)


def _value(node: dict) -> str:
    if "default" not in node:
        return "*required*"
    value = node["default"]
    if isinstance(value, dict):
        return "as below" if value else "none"
    if value in ("", []):
        return "none"
    words = {None: "null", True: "true", False: "false"}
    return f"`{words[value] if value is None or isinstance(value, bool) else value}`"


BOUNDS = (("minimum", "≥"), ("exclusiveMinimum", ">"), ("maximum", "≤"), ("exclusiveMaximum", "<"))


def _values(node: dict, defs: dict) -> str:
    """What a field may hold, in words."""
    for union in ("anyOf", "oneOf"):
        if union in node:
            return " or ".join(dict.fromkeys(_values(one, defs) for one in node[union]))
    if "$ref" in node:
        kind = defs[node["$ref"].rpartition("/")[2]]["properties"].get("kind", {}).get("const")
        return f"section `{kind}`" if kind else "section"
    if "enum" in node:
        return ", ".join(f"`{value}`" for value in node["enum"])
    if "const" in node:
        return f"`{node['const']}`"
    if node["type"] == "array":
        items = node.get("prefixItems") or [node["items"]]
        one = " and ".join(dict.fromkeys(_values(item, defs) for item in items))
        return f"{len(items)} of {one}" if "prefixItems" in node else f"list of {one}"
    if node["type"] == "object":
        return "sections by name"
    if node["type"] == "null":
        return "`null`"
    name = {"string": "text", "boolean": "`true`, `false`", "integer": "whole number"}
    bounds = " ".join(f"{sign} {node[key]:g}" for key, sign in BOUNDS if key in node)
    return f"{name.get(node['type'], node['type'])} {bounds}".strip()


def command_tables() -> str:
    """Every command's help: what it does, an example, its arguments and options."""
    return "\n\n".join(_command(typer.main.get_command(app), "distill"))


def _command(command: Any, name: str) -> Iterator[str]:
    if hasattr(command, "commands"):
        for below, one in command.commands.items():
            yield from _command(one, f"{name} {below}")
        return
    rows = ["| argument or option | |", "|---|---|"]
    for option in command.params:
        shown = getattr(option, "metavar", None) or "N"
        if option.param_type_name == "option":
            value = "" if option.is_flag else shown
            shown = f"{', '.join(option.opts)} {value}".strip()
        text = (getattr(option, "help", None) or "").replace("|", "\\|")
        rows.append(f"| `{shown}` | {text} |")
    yield "\n\n".join([f"## {name}", command.help or "", "\n".join(rows)])


TABLES: dict[str, Callable[[], str]] = {
    "recipe": recipe_tables,
    "zoo": lambda: zoo_markdown(zoo_rows()),
    "commands": command_tables,
}
