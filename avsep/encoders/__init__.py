"""Audio and visual encoders. Importing this package registers the built-in ones."""

from avsep.encoders.clip import ClipViTB32, SigLIP2Base
from avsep.encoders.conv7 import Conv7
from avsep.encoders.efficientnet import EfficientNetLite0
from avsep.encoders.frame_cnn import FrameCNN
from avsep.encoders.motion_cnn import MotionCNN
from avsep.encoders.precomputed import Precomputed
from avsep.encoders.resnet18 import ResNet18
from avsep.encoders.resnet18_map import ResNet18Map
from avsep.encoders.unet7 import UNet7
from avsep.encoders.videomae import VideoMAEBase

__all__ = [
    "ClipViTB32",
    "Conv7",
    "EfficientNetLite0",
    "FrameCNN",
    "MotionCNN",
    "Precomputed",
    "ResNet18",
    "ResNet18Map",
    "SigLIP2Base",
    "UNet7",
    "VideoMAEBase",
]
