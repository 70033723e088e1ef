"""Zeroth-order optimisation of one flat vector: plain torch."""

from wandazeta.zeroth_order.aggregation import (
    AGGREGATIONS,
    Aggregation,
    aligned_gradient,
    mean_gradient,
    normalised_gradient,
)
from wandazeta.zeroth_order.chunks import Evaluations
from wandazeta.zeroth_order.directions import (
    DISTRIBUTIONS,
    Direction,
    Directions,
    direction,
    directions_of_step,
    rademacher,
)
from wandazeta.zeroth_order.estimators import (
    Estimator,
    LossFn,
    OneSided,
    ProjectedGradients,
    TwoSided,
    projected_gradients,
)
from wandazeta.zeroth_order.forward_mode import ForwardMode
from wandazeta.zeroth_order.schedules import AdaZetaSchedule, ConstantSchedule, QuerySchedule
from wandazeta.zeroth_order.updates import RAdaZOUpdate, SGDUpdate, Update
from wandazeta.zeroth_order.variance import VarianceSchedule

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
