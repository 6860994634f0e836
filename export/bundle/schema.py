"""The manifest's JSON schema, and a check against it with the standard library alone.

A device should not need the `jsonschema` package to read a bundle. This covers the keywords that
``manifest.schema.json`` uses and refuses to run with any other, so that the two cannot drift apart unseen; the tests
hold it against `jsonschema` itself. It is stricter in one point: 2.0 is no integer, as it would be no index.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["SCHEMA_FILE", "first_mistake", "load_schema", "schema_text"]

SCHEMA_FILE = "manifest.schema.json"

_TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "null": (type(None),),
}
_SAYS_NOTHING = {"$schema", "$defs", "title", "description"}


def schema_text() -> str:
    """The published schema, as it stands in each bundle."""
    return (Path(__file__).parent / SCHEMA_FILE).read_text(encoding="utf-8")


@functools.cache
def load_schema() -> dict[str, Any]:
    schema: dict[str, Any] = json.loads(schema_text())
    return schema


def first_mistake(value: Any, schema: Mapping[str, Any] | None = None) -> str | None:
    """The first place where ``value`` breaks the schema (the manifest's when None), in words; None where it holds."""
    root = load_schema() if schema is None else schema
    return _check(value, root, root, "")


def _is(value: Any, name: str) -> bool:
    if isinstance(value, bool):  # in Python a bool is an int; in JSON it is not
        return name == "boolean"
    return isinstance(value, _TYPES[name])


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=True)
    return text if len(text) <= 60 else text[:57] + "..."


def _check(value: Any, schema: Mapping[str, Any], root: Mapping[str, Any], where: str) -> str | None:
    place = where or "it"
    for keyword, rule in schema.items():
        if keyword in _SAYS_NOTHING or (keyword == "additionalProperties" and rule is True):
            continue
        mistake = _KEYWORDS[keyword](value, rule, schema, root, where)
        if mistake is True:
            return f"{place} = {_shown(value)} breaks {keyword} {_shown(rule)}"
        if mistake:
            return str(mistake)
    return None


def _type(value: Any, rule: Any, schema: Any, root: Any, where: str) -> str | bool:
    names = [rule] if isinstance(rule, str) else rule
    if any(_is(value, name) for name in names):
        return False
    return f"{where or 'it'} = {_shown(value)} is not of type {' or '.join(names)}"


def _equal(a: Any, b: Any) -> bool:
    return isinstance(a, bool) == isinstance(b, bool) and bool(a == b)


def _required(value: Any, rule: Any, schema: Any, root: Any, where: str) -> str | bool:
    missing = [name for name in rule if isinstance(value, dict) and name not in value]
    return f"{where + '.' if where else ''}{missing[0]} is missing" if missing else False


def _properties(value: Any, rule: Any, schema: Any, root: Any, where: str) -> str | None:
    if isinstance(value, dict):
        for name in rule:
            if name in value and (mistake := _check(value[name], rule[name], root, f"{where}.{name}".lstrip("."))):
                return mistake
    return None


def _additional(value: Any, rule: Any, schema: Any, root: Any, where: str) -> str | None:
    if isinstance(value, dict):
        for name in value:
            if name in schema.get("properties", {}):
                continue
            if rule is False:
                return f"{where or 'it'} has an unknown key {_shown(name)}"
            if mistake := _check(value[name], rule, root, f"{where}[{_shown(name)}]"):
                return mistake
    return None


def _items(value: Any, rule: Any, schema: Any, root: Any, where: str) -> str | None:
    if isinstance(value, list):
        for index, item in enumerate(value):
            if mistake := _check(item, rule, root, f"{where}[{index}]"):
                return mistake
    return None


def _any_of(value: Any, rule: Any, schema: Any, root: Any, where: str) -> bool | str:
    mistakes = [_check(value, option, root, where) for option in rule]
    return mistakes[-1] or "" if all(mistakes) else False


def _ref(value: Any, rule: Any, schema: Any, root: Any, where: str) -> str | None:
    return _check(value, root["$defs"][rule.removeprefix("#/$defs/")], root, where)


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _repeats(value: Any) -> bool:
    return isinstance(value, list) and any(_equal(a, b) for i, a in enumerate(value) for b in value[:i])


_KEYWORDS: dict[str, Any] = {
    "type": _type,
    "const": lambda v, r, *_: not _equal(v, r),
    "enum": lambda v, r, *_: not any(_equal(v, option) for option in r),
    "required": _required,
    "properties": _properties,
    "additionalProperties": _additional,
    "items": _items,
    "anyOf": _any_of,
    "$ref": _ref,
    "pattern": lambda v, r, *_: isinstance(v, str) and not re.search(r, v),
    "minLength": lambda v, r, *_: isinstance(v, str) and len(v) < r,
    "minimum": lambda v, r, *_: _number(v) and not v >= r,
    "exclusiveMinimum": lambda v, r, *_: _number(v) and not v > r,
    "maximum": lambda v, r, *_: _number(v) and not v <= r,
    "minItems": lambda v, r, *_: isinstance(v, list) and len(v) < r,
    "maxItems": lambda v, r, *_: isinstance(v, list) and len(v) > r,
    "uniqueItems": lambda v, r, *_: r and _repeats(v),
}
