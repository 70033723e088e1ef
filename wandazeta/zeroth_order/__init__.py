"""Zeroth-order optimisation of one flat vector, in plain torch."""

from wandazeta.utilities.random_streams import (
    DISTRIBUTIONS,
    Direction,
    Directions,
    direction,
    directions_of_step,
    rademacher,
)
from wandazeta.zeroth_order.aggregation import (
    AGGREGATIONS,
    Aggregation,
    ProjectedGradients,
    aligned_gradient,
    mean_gradient,
    normalised_gradient,
    projected_gradients,
)
from wandazeta.zeroth_order.chunks import Evaluations
from wandazeta.zeroth_order.estimators import (
    DEFAULT_EPSILON,
    Estimator,
    ForwardMode,
    LossFn,
    OneSided,
    TwoSided,
)
from wandazeta.zeroth_order.head import HeadGradient, TrainedHead
from wandazeta.zeroth_order.rank_sync import RankSync
from wandazeta.zeroth_order.schedules import AdaZetaSchedule, ConstantSchedule, QuerySchedule, VarianceSchedule
from wandazeta.zeroth_order.updates import RAdaZOUpdate, SGDUpdate, Update

__all__ = [
    "AGGREGATIONS",
    "DEFAULT_EPSILON",
    "DISTRIBUTIONS",
    "AdaZetaSchedule",
    "Aggregation",
    "ConstantSchedule",
    "Direction",
    "Directions",
    "Estimator",
    "Evaluations",
    "ForwardMode",
    "HeadGradient",
    "LossFn",
    "OneSided",
    "ProjectedGradients",
    "QuerySchedule",
    "RAdaZOUpdate",
    "RankSync",
    "SGDUpdate",
    "TrainedHead",
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
