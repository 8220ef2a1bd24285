"""Networks, and what distillation attaches to them: taps on their features, adapters, and the fixed teacher."""

from gkd.models.adapters import ChannelAdapter
from gkd.models.checkpoints import read_weights
from gkd.models.classes import class_order
from gkd.models.classifiers import build_classifier
from gkd.models.heads import ClassHead, find_head
from gkd.models.listing import TapShape, list_taps
from gkd.models.maps import tokens_to_map
from gkd.models.outputs import read_logits
from gkd.models.taps import FeatureTaps
from gkd.models.teacher import Teacher
from gkd.models.weights import load_weights

__all__ = [
    "ChannelAdapter",
    "ClassHead",
    "FeatureTaps",
    "TapShape",
    "Teacher",
    "build_classifier",
    "class_order",
    "find_head",
    "list_taps",
    "load_weights",
    "read_logits",
    "read_weights",
    "tokens_to_map",
]
