"""JSON without its pitfalls: no NaN, no number beyond a float, no key twice, no depth beyond sense."""

from __future__ import annotations

import json
import math
from typing import Any

__all__ = ["MOST_DEPTH", "load_json"]

MOST_DEPTH = 64


def load_json(data: bytes) -> Any:
    """The value of a JSON document in UTF-8.

    Raises:
        ValueError: it is none, in words that fit after "is not valid JSON".
    """
    try:
        value = json.loads(
            data.decode("utf-8"),
            parse_constant=_constant,
            parse_float=_number,
            object_pairs_hook=_pairs,
        )
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"it is no text in UTF-8, from byte {error.start} on") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"line {error.lineno}: {error.msg}") from None
    except ValueError as error:
        raise ValueError("a number has too many digits" if "int string" in str(error) else str(error)) from None
    if b"\\ud" in data.lower():  # an escape that may be half of a character, which nothing can write or show
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError("a text in it holds half of a character") from None
    if _depth(value) > MOST_DEPTH:
        raise ValueError("it is nested too deeply")
    return value


def _constant(text: str) -> Any:
    raise ValueError(f"{text} is no number of JSON")


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text[:40]} is too large")
    return value


def _pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(items)
    if len(result) != len(items):
        keys = [key for key, _ in items]
        raise ValueError(f"the key {next(k for k in keys if keys.count(k) > 1)[:60]!r} stands twice")
    return result


def _depth(value: Any) -> int:
    depth, level = 0, [value]
    while level:
        depth += 1
        level = [
            child
            for parent in level
            if isinstance(parent, (dict, list))
            for child in (parent.values() if isinstance(parent, dict) else parent)
        ]
    return depth
