"""Networks, and what distillation attaches to them: taps on their features, adapters, and the fixed teacher."""

from gkd.models.adapters import ChannelAdapter
from gkd.models.classifiers import build_classifier
from gkd.models.taps import FeatureTaps, tokens_to_map
from gkd.models.teacher import Teacher
from gkd.models.weights import load_weights, read_weights

__all__ = ["ChannelAdapter", "FeatureTaps", "Teacher", "build_classifier", "load_weights", "read_weights", "tokens_to_map"]
