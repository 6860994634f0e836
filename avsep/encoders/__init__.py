"""Audio and visual encoders. Importing this package registers the built-in ones."""

from avsep.encoders.efficientnet import EfficientNetLite0
from avsep.encoders.frame_cnn import FrameCNN
from avsep.encoders.motion_cnn import MotionCNN
from avsep.encoders.precomputed import Precomputed
from avsep.encoders.unet7 import UNet7

__all__ = ["EfficientNetLite0", "FrameCNN", "MotionCNN", "Precomputed", "UNet7"]
