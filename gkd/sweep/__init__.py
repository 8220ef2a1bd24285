"""Ablations: what is compared, who does which cell, and the table of the results."""

from gkd.sweep.points import Sweep

__all__ = ["Sweep"]
