"""Mask decoders. Importing this package registers the built-in ones."""

from avsep.decoders.base import MaskDecoder
from avsep.decoders.channel_synthesizer import ChannelSynthesizer
from avsep.decoders.conditioned_unet import ConditionedUNet
from avsep.decoders.query_transformer import QueryTransformer

__all__ = ["ChannelSynthesizer", "ConditionedUNet", "MaskDecoder", "QueryTransformer"]
