"""Mask decoders. Importing this package registers the built-in ones."""

from avsep.decoders.aligned_query import AlignedQuery
from avsep.decoders.base import MaskDecoder
from avsep.decoders.channel_synthesizer import ChannelSynthesizer
from avsep.decoders.conditioned_unet import ConditionedUNet
from avsep.decoders.query_transformer import QueryTransformer
from avsep.decoders.ridge_filters import RidgeFilters
from avsep.decoders.tpavi import TPAVI

__all__ = [
    "TPAVI",
    "AlignedQuery",
    "ChannelSynthesizer",
    "ConditionedUNet",
    "MaskDecoder",
    "QueryTransformer",
    "RidgeFilters",
]
