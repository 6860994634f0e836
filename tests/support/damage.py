"""Damage at random: to bytes, and to the values of a JSON document."""

from __future__ import annotations

import json
import random
from typing import Any

__all__ = ["damaged_bytes", "damaged_value"]

_VALUES = (
    None, True, False, 0, -1, 1, 2, 1e9, -1e308, 10**30, 0.5, "", "x", "../../x", "/etc/passwd", "a\0b", "\ud800",
    "=1+1", "[/x]", "9" * 400, [], [[]], {}, {"": ""}, [None] * 3, "NaN", 2**31, 2**63,
)  # fmt: skip


def damaged_bytes(data: bytes, rng: random.Random) -> bytes:
    """One to three changes: a bit, a byte, a cut, a run of zeros, a part twice or gone, a number made huge."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        if not changed:
            return bytes(changed)
        # headers are where readers go wrong
        at = rng.randrange(len(changed) if rng.random() < 0.4 else min(len(changed), 200))
        kind = rng.randrange(8)
        if kind == 0:
            changed[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            changed[at] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
        elif kind == 2:
            del changed[at:]
        elif kind == 3:
            length = rng.randint(1, 64)
            changed[at : at + length] = bytes(len(changed[at : at + length]))
        elif kind == 4:
            del changed[at : at + rng.randint(1, 200)]
        elif kind == 5:
            changed[at:at] = changed[at : at + rng.randint(1, 400)]
        elif kind == 6:
            width = rng.choice((2, 4, 8))
            changed[at : at + width] = b"\xff" * width if rng.random() < 0.5 else b"\xff" * (width - 1) + b"\x7f"
        else:
            changed[at:at] = bytes(rng.randrange(256) for _ in range(rng.randint(1, 16)))
    return bytes(changed)


def damaged_value(value: Any, rng: random.Random) -> Any:
    """A copy of plain data with one to three of its values or keys replaced, gone or doubled."""
    found = json.loads(json.dumps(value))
    for _ in range(rng.randint(1, 3)):
        places = list(_places(found))
        if not places:
            return rng.choice(_VALUES)
        holder, key = rng.choice(places)
        kind = rng.randrange(6)
        if kind == 0:
            del holder[key]
        elif kind == 1 and isinstance(holder, dict):
            holder[rng.choice(("x", "", "\0", "../y", str(key) + "2"))] = holder.pop(key)
        elif kind == 2 and isinstance(holder, list):
            holder.append(holder[key])
        elif kind == 3 and isinstance(holder[key], (int, float)) and not isinstance(holder[key], bool):
            holder[key] = rng.choice((-holder[key], holder[key] * 10**9, holder[key] + 1, str(holder[key])))
        else:
            holder[key] = rng.choice(_VALUES)
    return found


def _places(value: Any) -> Any:
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        yield value, key
        yield from _places(child)
