"""Names as people write them in one word of a command; light, for what only prints a help text."""

from __future__ import annotations

import csv
import re
import unicodedata
from collections.abc import Sequence

from .errors import ConfigError

__all__ = ["names_in"]


def names_in(text: str, known: Sequence[str] = ()) -> list[str]:
    """The names of a list with commas. A name that has commas itself stands in double quotes, or is one of the
    ``known`` ones: ``male speech, man speaking,violin`` are two of them, and ``left=male speech, man speaking`` is one.

    Of the ``known`` names case does not matter, nor whether words are joined by spaces, ``_`` or ``-``, as long as it
    is clear which is meant; and where nothing else is written, spaces part them as commas do: ``Flute acoustic guitar``
    are ``flute`` and ``acoustic_guitar``. What is none of them is given back as it is written.

    Raises:
        ConfigError: a quote is not closed.
    """
    try:
        (parts,) = csv.reader([text], skipinitialspace=True, strict=True)
    except (csv.Error, ValueError) as error:
        raise ConfigError(f"{text!r} is no list of names with commas: {error}") from None
    words = [part.strip() for part in parts]
    meant = _Meant(known)
    longest = max((name.count(",") + 1 for name in known), default=1)
    names: list[str] = []
    at = 0
    while at < len(words):
        for count in range(min(longest, len(words) - at), 1, -1):
            if (name := meant.name(",".join(words[at : at + count]))) is not None:
                names.append(name)
                at += count
                break
        else:
            names += _parted(words[at], meant)
            at += 1
    return [name for name in names if name]


def _key(name: str) -> str:
    """What is the same of names that mean the same."""
    plain = re.sub(r"[\s_-]+", " ", unicodedata.normalize("NFC", name).casefold())
    return re.sub(r" ?, ?", ",", plain).strip()


class _Meant:
    """The known names, by how they may be written."""

    def __init__(self, known: Sequence[str]) -> None:
        self.exact = {unicodedata.normalize("NFC", name): name for name in known}
        alike: dict[str, list[str]] = {}
        for name in dict.fromkeys(known):
            alike.setdefault(_key(name), []).append(name)
        self.alike = {key: names[0] for key, names in alike.items() if len(names) == 1}  # else it is not clear

    def name(self, text: str) -> str | None:
        """The known name that is written, alone or as ``OWN=NAME``; None where it is none."""
        if (name := self._alone(text)) is not None:
            return name
        own, sign, rest = (part.strip() for part in text.partition("="))
        name = self._alone(rest) if sign else None
        return None if name is None else f"{own}={name}"

    def _alone(self, text: str) -> str | None:
        return self.exact.get(unicodedata.normalize("NFC", text)) or self.alike.get(_key(text))


def _parted(text: str, meant: _Meant) -> list[str]:
    """The known names that spaces part, the longest first; the text itself where some of it is none of them."""
    if (whole := meant.name(text)) is not None:
        return [whole]
    words, names = text.split(), []
    while words:
        for count in range(len(words), 0, -1):
            if (name := meant.name(" ".join(words[:count]))) is not None:
                names.append(name)
                words = words[count:]
                break
        else:
            return [text]
    return names
