"""Zeroth-order optimisation of one flat vector: plain torch."""

from .directions import Direction, direction
from .estimators import ProjectedGradients, QueryLosses, perturbed, projected_gradients, two_sided
from .schedules import AdaZetaSchedule, ConstantSchedule, QuerySchedule
from .updates import RAdaZOUpdate, SGDUpdate, Update, estimated_gradient

__all__ = [
    "AdaZetaSchedule",
    "ConstantSchedule",
    "Direction",
    "ProjectedGradients",
    "QueryLosses",
    "QuerySchedule",
    "RAdaZOUpdate",
    "SGDUpdate",
    "Update",
    "direction",
    "estimated_gradient",
    "perturbed",
    "projected_gradients",
    "two_sided",
]
