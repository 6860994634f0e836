"""Mixers: which clips meet in a training mixture. Importing this package registers the built-in ones."""

from avsep.mixers.as_published import AsPublished
from avsep.mixers.balanced import Balanced
from avsep.mixers.base import Draw, Mixer, Pool
from avsep.mixers.confusable import Confusable
from avsep.mixers.online import Online
from avsep.mixers.varied import Varied

__all__ = ["AsPublished", "Balanced", "Confusable", "Draw", "Mixer", "Online", "Pool", "Varied"]
