"""Zeroth-order optimisation of one flat vector: plain torch."""

from .aggregation import AGGREGATIONS, Aggregation, aligned_gradient, mean_gradient, normalised_gradient
from .chunks import Evaluations
from .directions import DISTRIBUTIONS, Direction, Directions, direction, directions_of_step, rademacher
from .estimators import Estimator, LossFn, OneSided, ProjectedGradients, TwoSided, projected_gradients
from .forward_mode import ForwardMode
from .schedules import AdaZetaSchedule, ConstantSchedule, QuerySchedule
from .updates import RAdaZOUpdate, SGDUpdate, Update
from .variance import VarianceSchedule

__all__ = [
    "AGGREGATIONS",
    "DISTRIBUTIONS",
    "AdaZetaSchedule",
    "Aggregation",
    "ConstantSchedule",
    "Direction",
    "Directions",
    "Estimator",
    "Evaluations",
    "ForwardMode",
    "LossFn",
    "OneSided",
    "ProjectedGradients",
    "QuerySchedule",
    "RAdaZOUpdate",
    "SGDUpdate",
    "TwoSided",
    "Update",
    "VarianceSchedule",
    "aligned_gradient",
    "direction",
    "directions_of_step",
    "mean_gradient",
    "normalised_gradient",
    "projected_gradients",
    "rademacher",
]
