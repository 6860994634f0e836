"""Audio encoders, one family a file."""

from avsep.encoders.audio.causal_unet import CausalUNet
from avsep.encoders.audio.conv7 import Conv7
from avsep.encoders.audio.unet7 import UNet7

__all__ = ["CausalUNet", "Conv7", "UNet7"]
