"""Losses between a student and a teacher: logits, feature maps, relations and graphs; functions of tensors, and thin modules around them."""

from gkd.losses.attention import channel_attention, feature_attention, node_attention, spatial_attention

__all__ = ["channel_attention", "feature_attention", "node_attention", "spatial_attention"]
