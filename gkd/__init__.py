"""Graph-based knowledge distillation in computer vision, built on PyTorch Geometric."""

__version__ = "0.2.0"
