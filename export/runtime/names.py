"""Names as people write them in one word of a command; light, for what only prints a help text."""

from __future__ import annotations

import csv
from collections.abc import Sequence

from .errors import ConfigError

__all__ = ["names_in"]


def names_in(text: str, known: Sequence[str] = ()) -> list[str]:
    """The names of a list with commas. A name that has commas itself stands in double quotes, or is one of the
    ``known`` ones: ``male speech, man speaking,violin`` are two of them, and ``left=male speech, man speaking`` is one.

    Raises:
        ConfigError: a quote is not closed.
    """
    try:
        (parts,) = csv.reader([text], skipinitialspace=True, strict=True)
    except (csv.Error, ValueError) as error:
        raise ConfigError(f"{text!r} is no list of names with commas: {error}") from None
    words = [part.strip() for part in parts]
    whole = {tuple(part.strip() for part in name.split(",")): name for name in known if "," in name}
    longest = max(map(len, whole), default=1)
    names, at = [], 0
    while at < len(words):
        own, sign, first = (part.strip() for part in words[at].partition("="))
        for count in range(min(longest, len(words) - at), 1, -1):
            if (name := whole.get(tuple(words[at : at + count]))) is None and sign:
                name = whole.get((first, *words[at + 1 : at + count]))
                name = None if name is None else f"{own}={name}"
            if name is not None:
                names.append(name)
                at += count
                break
        else:
            names.append(words[at])
            at += 1
    return [name for name in names if name]
