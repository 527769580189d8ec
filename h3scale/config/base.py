"""Reading recipes: YAML with `extends`, overrides, and findings that say what would work."""

import difflib
import re
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from h3scale.config.strict import Strict
from h3scale.config.tiny import TINY, toy_values
from h3scale.errors import ConfigError, MissingInputError

R = TypeVar("R", bound=Strict)


def find(path: str | Path) -> Path:
    """A file people named: as given from the current folder, else the shipped one of that name (recipes/, ds_configs/)."""
    given = Path(path)
    found = given if given.is_file() else shipped(given)
    if found is None:
        raise MissingInputError(f"{path}: no such file")
    return found


def shipped(given: Path) -> Path | None:
    """What h3scale brings along under that name, a file or a folder."""
    package = Path(str(files("h3scale")))
    for root in (package / "shipped", package.parent):
        if not given.is_absolute() and given.parts[:1] in (("recipes",), ("ds_configs",)) and (root / given).exists():
            return root / given
    return None


def load_recipe(schema: type[R], path: str | Path, overrides: list[str] | None = None) -> R:
    """Reads a recipe, applies `key.sub=value` overrides (values are YAML), checks everything.

    `data=PATH` is short for `data.records=[PATH]`; `model=tiny` makes it a recipe of toy size (see config.tiny).

    Raises ConfigError (78) with all findings, each `file: key: what is wrong (what would work)`.
    """
    values = load_yaml(find(path))
    words = overrides or []
    if TINY in words:  # first: what else is written on the command line goes over its values as well
        values = _merge(values, toy_values(values, str(path)))
    for override in words:
        if override != TINY:
            apply_override(values, override)
    return checked(schema, values, str(path))


def checked(schema: type[R], values: dict[str, Any], where: str) -> R:
    """The values as the schema has them; ConfigError (78) with all that it has to say against them."""
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        raise ConfigError([_finding(where, schema, item) for item in _told_once(error.errors())]) from None


def load_yaml(path: Path, below: tuple[Path, ...] = ()) -> dict[str, Any]:
    """A YAML mapping. `extends: other.yaml` (relative to this file) gives the values this file does not set."""
    if path.resolve() in below:
        raise ConfigError(f"{path}: extends itself (by {' -> '.join(str(p.name) for p in below)})")
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeyLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise ConfigError(f"{path}{line}: not valid YAML ({getattr(error, 'problem', error)})") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not valid UTF-8 ({error.reason} at byte {error.start})") from None
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected `key: value` lines, found {type(values).__name__}")
    parent = values.pop("extends", None)
    if parent is None:
        return values
    base = path.parent / str(parent)
    if not base.is_file():
        raise MissingInputError(f"{path}: extends: {parent}: no such file")
    return _merge(load_yaml(base, (*below, path.resolve())), values)


class _UniqueKeyLoader(yaml.SafeLoader):
    """Refuses a key that is written twice; plain YAML takes the last one in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key must be a word", key.start_mark)
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key '{key.value}' is written twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


# PyYAML follows YAML 1.1, where 1e-3 without a dot is a string; people who write recipes mean a number.
_UniqueKeyLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def _merge(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in top.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def apply_override(values: dict[str, Any], override: str) -> None:
    """Writes `key.sub=value` into the values of a recipe; the value is YAML. ConfigError (78) for anything else."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"'{override}': an override is key=value, such as train.steps=100")
    *parents, last = key.split(".")
    place = values
    for parent in parents:
        place = place.setdefault(parent, {})
        if not isinstance(place, dict):
            raise ConfigError(f"'{override}': {parent} is a value, not a section")
    try:
        value = yaml.load(text, Loader=_UniqueKeyLoader)
    except yaml.YAMLError as error:
        raise ConfigError(f"'{override}': the value is not valid YAML ({getattr(error, 'problem', error)})") from None
    if key == "data" and isinstance(value, str):  # data=DIR: other records, all else as it is
        place, last, value = values.setdefault("data", {}), "records", [value]
    place[last] = value


TYPE_ERRORS = ("dict_type", "float_type", "string_type")


def _key(item: Any) -> str:
    tags = ("function-", "dict[", "list[", "constrained-")
    return ".".join(str(part) for part in item["loc"] if not str(part).startswith(tags))


def _told_once(items: list[Any]) -> list[Any]:
    """Of a value that may have one of two types, pydantic tells what is wrong with it as either; one of them is meant."""
    told: list[Any] = []
    for item in sorted(items, key=lambda item: item["type"] in TYPE_ERRORS):
        key = _key(item)
        if item["type"] not in TYPE_ERRORS or not any(_key(other) == key or _key(other).startswith(f"{key}.") for other in told):
            told.append(item)
    return [item for item in items if item in told]


def _finding(where: str, schema: type[BaseModel], item: Any) -> str:
    key = _key(item)
    if item["type"] == "extra_forbidden":
        known = _fields_at(schema, item["loc"][:-1])
        near = difflib.get_close_matches(str(item["loc"][-1]), known, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"works: {', '.join(sorted(known))}"
        return f"{where}: {key}: unknown key ({hint})"
    if item["type"] == "missing":
        return f"{where}: {key}: is required"
    if item["type"] == "model_type":
        known = _fields_at(schema, item["loc"])
        return f"{where}: {key}: {item['input']!r}: expected a section with keys of its own (works: {', '.join(sorted(known))})"
    message = item["msg"].removeprefix("Value error, ")
    value = "" if isinstance(item["input"], dict) else f"{item['input']!r}: "
    return f"{where}: {key}: {value}{message}" if key else f"{where}: {message}"


def _fields_at(schema: type[BaseModel], loc: tuple[Any, ...]) -> list[str]:
    current: type[BaseModel] = schema
    for part in loc:
        field = current.model_fields.get(str(part))
        current = next(_models_in(field.annotation), current) if field else current
    return list(current.model_fields)


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """The models that an annotation such as `list[Source] | None` speaks of."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in getattr(annotation, "__args__", ()):
        yield from _models_in(part)
