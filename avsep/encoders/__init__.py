"""Audio and visual encoders. Importing this package registers the built-in ones."""

from avsep.encoders.audio.causal_unet import CausalUNet
from avsep.encoders.audio.conv7 import Conv7
from avsep.encoders.audio.unet7 import UNet7
from avsep.encoders.base import AudioEncoder, VisualEncoder
from avsep.encoders.visual.clip import ClipViTB32, SigLIP2Base
from avsep.encoders.visual.efficientnet import EfficientNetLite0
from avsep.encoders.visual.frame_cnn import FrameCNN
from avsep.encoders.visual.motion_cnn import MotionCNN
from avsep.encoders.visual.precomputed import Precomputed
from avsep.encoders.visual.resnet18 import ResNet18
from avsep.encoders.visual.resnet18_map import ResNet18Map
from avsep.encoders.visual.videomae import VideoMAEBase

__all__ = [
    "AudioEncoder",
    "CausalUNet",
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
    "VisualEncoder",
]
