"""Training a student under a teacher: the distiller, the schedules of its weights and their balance."""

from gkd.distill.balance import GradientBalance
from gkd.distill.distiller import Distiller
from gkd.distill.networks import NetworkPair
from gkd.distill.schedule import Constant, Ramp, Schedule, Share

__all__ = ["Constant", "Distiller", "GradientBalance", "NetworkPair", "Ramp", "Schedule", "Share"]
