"""YAML as recipes are written in it."""

import re
from typing import Any

import yaml

from distill.errors import InputError

MERGE = "tag:yaml.org,2002:merge"  # of the key <<, which takes over another mapping's keys


# libyaml's parser where PyYAML has it, as all of its wheels do: it takes half the time.
_Base = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _Loader(_Base):
    """YAML in which 1e-3 is a number, keys are names and none is given twice."""

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        keys = [key for key, _ in node.value if key.tag != MERGE]
        names = [self.construct_object(key, deep=True) for key in keys]
        for place, (key, name) in enumerate(zip(keys, names, strict=True)):
            if not isinstance(name, str):
                problem = f"{key.value!r} is read as {name!r}, but a key must be a name"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            if name in names[:place]:
                problem = f"{name!r} is given twice"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
        super().flatten_mapping(node)
        # A mapping may be merged into others before its own turn comes, and is checked again then.
        node.value = list({key.value: (key, value) for key, value in node.value}.values())


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def parse_yaml(text: str, label: str) -> Any:
    """What the text says; InputError with `label` and the line for what is not YAML."""
    loader = _Loader(text)
    try:
        return _whole(loader.get_single_data())
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise InputError(f"{label}{line}: not valid YAML: {problem}") from error
    finally:
        loader.dispose()


def _whole(value: Any) -> Any:
    """1.1e6 may stand where a whole number is wanted."""
    if isinstance(value, dict):
        return {key: _whole(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_whole(part) for part in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value
