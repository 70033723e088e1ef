"""Fine-tuning with forward passes alone, as a LightningModule for stock strategies (AdaZeta, arXiv 2406.18060)."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelPruning,
    ModelSummary,
    SpikeDetection,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.optim import SGD, Adam, Optimizer
from torch.optim.lr_scheduler import LRScheduler
from typing_extensions import override

from wandazeta.adapters import AdapterVector, TensorTrainAdapters, Trainable, TrainedVector, adapted_modules
from wandazeta.adapters.files import (
    describe_backbone,
    load_adapter_files,
    require_same,
    save_adapter_files,
    written_backbone,
)
from wandazeta.lightning_compat import (
    attached_trainer,
    averaged_modules,
    averages_buffers,
    exclude_from_ddp,
    is_fitting,
    is_logging_step,
    num_training_steps,
)
from wandazeta.models.blocks import find_blocks
from wandazeta.models.loading import LoadingOptions
from wandazeta.models.modes import evaluation_mode
from wandazeta.models.sharded import is_sharded
from wandazeta.modules.checkpoints import require_checkpoint_of
from wandazeta.modules.language_model import LanguageModel, NonFiniteLossError
from wandazeta.modules.step_cost import StepCost
from wandazeta.modules.strategies import (
    configure_deepspeed,
    limit_gathered_weights,
    needs_stateful_optimizer,
    refuse_sharded_weights,
)
from wandazeta.modules.summary import show_trained_values
from wandazeta.modules.supported_callbacks import copy_module_again, model_states, refuse_callbacks
from wandazeta.scoring.frozen_prefix import FrozenPrefix
from wandazeta.scoring.graphed_losses import GraphedLosses
from wandazeta.scoring.objectives import GeneratedText, Objective, check_objective, objective_losses
from wandazeta.scoring.scorer import Prepared, Scores
from wandazeta.utilities.arguments import check_choice, check_range, describe_rates, stepped
from wandazeta.utilities.graphs import graph_backend
from wandazeta.utilities.random_streams import drawn_by
from wandazeta.zeroth_order import (
    DEFAULT_EPSILON,
    ConstantSchedule,
    Directions,
    Estimator,
    HeadGradient,
    LossFn,
    OneSided,
    QuerySchedule,
    RankSync,
    SGDUpdate,
    TrainedHead,
    TwoSided,
    Update,
    projected_gradients,
)

# of a step function, whose value the default for a smooth loss would not change
_OBJECTIVE_EPSILON = 0.1
_STATES = ("progress", "adapters.update_states", "adapters.schedule_states")
"""Buffers that are states of the training instead of trained values."""

_REFUSED_CALLBACKS: dict[type[Callback], str] = {
    BaseFinetuning: "it trains frozen weights by gradients; choose the trained part by `trainable`",
    GradientAccumulationScheduler: "every step is an update; set the batch size and the number of queries",
    LearningRateFinder: "it needs automatic optimization; set `learning_rate`",
    ModelPruning: "it masks frozen weights under trained adapters; use WandaPPPruneCallback",
    SpikeDetection: "it reads losses of automatic optimization; losses that are not finite end the run by themselves",
    StochasticWeightAveraging: "it averages parameters, and adapters are buffers; use WeightAveraging",
}

MAX_NONFINITE_STEPS = 10
"""Steps in a row without any finite query after which a run stops."""


class ZerothOrderModule(LanguageModel):
    """A language model that is fine-tuned with forward passes alone: adapters (and a new head), or its own weights.

    The backbone is frozen. In every step, the slopes of the loss along Q random directions, drawn from (seed, step,
    query), estimate the gradient of the adapters; by default this is two-sided Gaussian SPSA with plain SGD. The stored
    adapters are never perturbed: perturbed copies of them are evaluated, folded into the batch. All adapters are in one
    flat fp32 buffer, which no strategy shards. A trainable parameter with one value, the anchor, gives strategies the
    optimizer that they require; its learning rate and scheduler are those of the adapters.

    Args:
        model_name_or_path: Hugging Face name or local directory of a causal language model, or of an encoder.
        loading: Precision, attention kernels, pad token and other options of loading; see `LoadingOptions`.
        trainable: What is trained: `TensorTrainAdapters` (AdaZeta's, the default), `LoRAAdapters`, or the model's own
            `Weights`.
        head: Options of a head that is trained together with adapters; see `TrainedHead`.
        objective: What is minimised: one minus a metric of torchmetrics (of scores and labels) or of `GeneratedText`;
            by default the cross-entropy. A metric is a step function, which needs large batches and a large
            `epsilon`.
        estimator: How the gradient is estimated: `TwoSided` differences (2 forwards for each query, the default),
            `OneSided` differences (1 for each query and 1 more, the default for a head with an exact gradient) or
            exact `ForwardMode` derivatives (counted as 2). With an `objective`, the default has an `epsilon` of 0.1.
        schedule: Number of queries of a step: `ConstantSchedule` (8 by default), `AdaZetaSchedule` (by the epoch) or
            `VarianceSchedule` (more as the slopes become smaller).
        update: Rule that moves the adapters along the estimated gradient: `SGDUpdate` (AdaZeta's, the default) or
            `RAdaZOUpdate`.
        learning_rate: Learning rate of the update.
        lr_scheduler: Creates a learning rate scheduler from the optimizer; it is stepped after every training step.
        query_chunk_size: Perturbed copies that are evaluated in one forward; halved when memory runs out.
        prefix_cache_gib: Memory of each process, in GiB, for hidden states below the first adapter, which are computed
            once for each example; 0 turns the cache off. Further examples are computed in every step. On a GPU, up to
            an eighth of its free memory is used before CPU memory.
        parallel: What is divided over ranks: the `queries` of a step on the same batch, or the `data` of its batch.
        max_forwards: Budget of forward passes; the run ends before the step that would exceed it.
        seed: Seed of the directions and of the adapters' initial values.

    Raises:
        ValueError: If an argument is out of range, or does not fit another one, the model or the trainer.
    """

    progress: Tensor
    """Numbers of steps, forward passes and updates (steps that had an estimate), shape `(3,)`."""
    objective: Objective | None

    def __init__(
        self,
        model_name_or_path: str,
        loading: LoadingOptions | None = None,
        trainable: Trainable | None = None,
        head: TrainedHead | None = None,
        objective: Objective | None = None,
        estimator: Estimator | None = None,
        schedule: QuerySchedule | None = None,
        update: Update | None = None,
        learning_rate: float = 1e-4,
        lr_scheduler: Callable[[Optimizer], LRScheduler] | None = None,
        query_chunk_size: int = 16,
        prefix_cache_gib: float = 4.0,
        parallel: Literal["queries", "data"] = "queries",
        max_forwards: int | None = None,
        seed: int = 0,
    ) -> None:
        loading = loading or LoadingOptions()
        trainable = trainable or TensorTrainAdapters()
        if estimator is None:
            epsilon = None if objective is None else _OBJECTIVE_EPSILON
            is_exact = head is not None and head.gradient == "exact"
            estimator = OneSided(epsilon) if is_exact else TwoSided(epsilon)
        schedule = schedule or ConstantSchedule(8)
        check_range("learning_rate", learning_rate, learning_rate > 0, "above 0")
        check_range("query_chunk_size", query_chunk_size, query_chunk_size >= 1, "at least 1")
        check_range("prefix_cache_gib", prefix_cache_gib, prefix_cache_gib >= 0, "at least 0")
        check_choice("parallel", parallel, ("queries", "data"))
        is_estimator = isinstance(estimator, Estimator)
        check_range("estimator", estimator, is_estimator, "TwoSided(), OneSided() or ForwardMode()")
        loading.refuse("stream_weights", type(self).__name__, "it is for `prune` with LanguageModel")
        _check_schedule(schedule, estimator, max_forwards)
        _check_objective(objective, estimator)
        _check_trainable(trainable, estimator, loading)
        if head is not None:
            _check_head(head, trainable, objective, estimator, loading)
        super().__init__(model_name_or_path, loading)
        if self.tokenizer.pad_token is None:
            raise ValueError(
                f"Expected the tokenizer of {model_name_or_path} to have a pad token, but it has none; "
                f"set `loading.pad_token`, for example to {self.tokenizer.eos_token!r}"
            )
        self.automatic_optimization = False
        self.strict_loading = False
        self.trainable = trainable
        self.head = head or TrainedHead()
        # not as a submodule: precision plugins would cast the states of a metric
        self.__dict__["objective"] = objective
        self.estimator = estimator
        self.schedule = schedule
        self.update = update or SGDUpdate()
        self.learning_rate = learning_rate
        self.lr_scheduler = lr_scheduler
        self.query_chunk_size = query_chunk_size
        self.prefix_cache_gib = prefix_cache_gib
        self.parallel = parallel
        self.max_forwards = max_forwards
        self.seed = seed

        self.adapters: TrainedVector | None = None
        """The trained vector, once `setup` has inserted it."""
        self.pruned_backbone_key: str | None = None
        """Key of the backbone's pruning, set by the callback that prunes it."""
        self._backbone_description: dict[str, Any] = {}
        # not a scalar, which DeepSpeed cannot broadcast
        self.anchor = nn.Parameter(torch.zeros(1, dtype=torch.float32))
        # a buffer, to be written together with the adapters
        self.register_buffer("progress", torch.zeros(3, dtype=torch.int64))
        self._updates = self._nonfinite_steps = 0
        # what drew the directions before a checkpoint
        self._drawn_by: str | None = None
        self._rank_sync: RankSync | None = None
        # while it trains, where forward passes can be graphs
        self._graphed_losses: GraphedLosses | None = None
        self._step_cost = StepCost(self._cached_bytes)
        if not loading.shard_on_load:
            self.trainable.check(self.backbone, self.update.num_states)

    @property
    def data_sharding(self) -> tuple[int, int]:
        """How the training data are sharded: (number of shards, index of this rank's shard)."""
        if self.parallel == "queries" or attached_trainer(self) is None:
            return 1, 0
        return self.trainer.world_size, self.trainer.global_rank

    @property
    def compute_dtype(self) -> torch.dtype:
        """Precision of the forward pass."""
        precision = str(self.trainer.precision)
        if precision.startswith("bf16"):
            return torch.bfloat16
        if precision.startswith("16"):
            return torch.float16
        # ZeRO-3 keeps the dtype of weights that it shards
        dtype = next(p.dtype for p in self.backbone.parameters() if p.is_floating_point())
        return dtype if dtype in DEFAULT_EPSILON else torch.float32

    # -- insertion of the adapters

    @override
    def configure_callbacks(self) -> list[Callback]:
        """Check the callbacks of the trainer before one of them prunes the model, which takes long."""
        own = super().configure_callbacks()
        if is_fitting(self.trainer):
            refuse_callbacks(self.trainer, type(self).__name__, _REFUSED_CALLBACKS)
            callbacks: list[Callback] = self.trainer.callbacks  # type: ignore[attr-defined]
            for callback in callbacks:
                if isinstance(callback, ModelSummary):
                    show_trained_values(callback, "adapters", self._count_trained)
                if isinstance(callback, WeightAveraging) and not averages_buffers(callback):
                    raise ValueError(
                        f"Expected argument `use_buffers` of {type(callback).__name__} to be True for "
                        f"{type(self).__name__}, but got False: adapters are buffers, and nothing would be averaged"
                    )
        return own

    def _count_trained(self) -> tuple[int, int]:
        """Number of trained values, and how many of them are no parameters."""
        assert self.adapters is not None
        number = self.adapters.num_parameters
        return number, number if isinstance(self.adapters, AdapterVector) else 0

    @override
    def setup(self, stage: str) -> None:
        """Freeze the backbone, which a callback may have pruned by now, and insert the adapters."""
        trainer = attached_trainer(self)
        if trainer is not None:
            if stage == "fit" and self.trainable.needs_whole_weights:
                refuse_sharded_weights(trainer.strategy)
            configure_deepspeed(trainer.strategy)
        if self._build_sharded():
            self.trainable.check(self.backbone, self.update.num_states)
        if trainer is not None:
            limit_gathered_weights(trainer.strategy, self.backbone)
        if self.adapters is None:
            self._insert_adapters()
            if trainer is not None:
                copy_module_again(trainer, self, stage)
        self._is_set_up = True

    def _insert_adapters(self) -> None:
        self._backbone_description = describe_backbone(self.backbone, self.pruned_backbone_key)
        self.backbone.requires_grad_(False)
        linears = [] if self.loading.num_classes is None else ["head"]
        self.adapters = adapters = self.trainable.insert(self.backbone, self.seed, linears)
        if self.head.num_answers is not None:
            config: Any = self.backbone.config
            width = config.get_text_config().hidden_size
            self.scorer.adapt(answers=adapters.append_linear("answers", width, self.head.num_answers))
        # buffers of the vector, which keeps its precision whatever the strategy casts to
        update_states = adapters.theta.new_zeros((self.update.num_states, len(adapters.theta)), dtype=torch.float32)
        adapters.register_buffer("update_states", update_states)
        schedule_states = adapters.theta.new_zeros(self.schedule.num_states, dtype=torch.float64)
        adapters.register_buffer("schedule_states", schedule_states)
        self.scorer.adapt(head_rows=adapters.rows)
        sites = adapted_modules(self.backbone)
        if adapters.supports_prefix and self.prefix_cache_gib > 0 and not isinstance(self.objective, GeneratedText):
            _, blocks = find_blocks(self.backbone)
            self.scorer.prefix = FrozenPrefix(self.backbone, blocks, sites, int(self.prefix_cache_gib * 2**30))
        # DDP would broadcast every buffer at every forward: megabytes in each step, which would also hide drift
        exclude_from_ddp(self, [name for name, _ in self.named_buffers()])
        self._backbone_modules = list(self.backbone.modules())
        rank_zero_info(f"{adapters.num_parameters:,} trained values, {len(sites)} adapters")

    @override
    def configure_optimizers(self) -> Any:
        return stepped(self._new_optimizer(), self.lr_scheduler)

    def _new_optimizer(self) -> Optimizer:
        """Return the optimizer of the anchor, whose gradient is zero: only its learning rate matters."""
        trainer = attached_trainer(self)
        kind = Adam if trainer is not None and needs_stateful_optimizer(trainer.strategy) else SGD
        return kind([self.anchor], lr=self.learning_rate)

    @override
    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load a state; adapters in it are inserted first, as the main process of `ddp_spawn` has not run `setup`."""
        if self.adapters is None and "adapters.update_states" in state_dict:
            self._insert_adapters()
        return super().load_state_dict(state_dict, strict, assign)

    # -- training

    @override
    def on_fit_start(self) -> None:
        self._prepare_fit()

    def _prepare_fit(self) -> None:
        """Choose what depends on the trainer, before the first forward."""
        assert self.adapters is not None
        # every forward gathers sharded weights from all ranks, so all ranks must run equally many
        sharded = any(map(is_sharded, self.backbone.parameters()))
        self.adapters.prepare_fit()
        reduce = partial(self.trainer.strategy.reduce, reduce_op="sum")
        world_size, rank = self.trainer.world_size, self.trainer.global_rank
        self._rank_sync = RankSync(world_size, rank, reduce, self.parallel, lockstep=sharded)
        dtype = self.compute_dtype
        self._estimator = self.estimator.with_default_epsilon(dtype)
        exact = self.head.gradient == "exact"
        self._head_gradient = HeadGradient(self.adapters.linears_slice) if exact else None
        if self.parallel == "queries" and self.estimator.num_points(self.schedule.max_queries) < world_size:
            rank_zero_warn(
                f"{self.schedule.max_queries} queries are too few for {world_size} ranks: some ranks will be idle"
            )
        if (warning := self.estimator.precision_warning(dtype)) is not None:
            rank_zero_warn(warning)
        if sharded and self.scorer.prefix is not None:
            self.scorer.prefix = None
            rank_zero_info("The prefix cache is off, because the strategy shards the backbone's weights.")

    @override
    def on_train_start(self) -> None:
        if self._rank_sync is None:
            # BatchSizeFinder trains before the hook `on_fit_start` of the module
            self._prepare_fit()
        step = self.trainer.global_step
        self._updates = int(self.progress[0])
        if self._updates not in (step, step + 1):
            # adapters that were loaded from another run start a new one
            self._updates = step
            self.progress[0] = step
        self.trainer.should_stop |= self._exceeds_budget(step)
        # only now is the module on its device, whatever the strategy
        here = drawn_by(self.device)
        if self._drawn_by not in (None, here):
            rank_zero_warn(
                f"The checkpoint's directions were drawn by {self._drawn_by} and new ones are drawn by {here}: "
                "training continues, along other directions than those of an uninterrupted run"
            )
        self._step_cost = StepCost(self._cached_bytes)
        self._graphed_losses = self._new_graphed_losses()

    def _new_graphed_losses(self) -> GraphedLosses | None:
        """Return losses by CUDA graphs; None if nothing captures them, or they are more than a forward of the model."""
        assert self.adapters is not None
        backend = graph_backend(self.device)
        sharded = any(map(is_sharded, self.backbone.parameters()))
        if backend is None or sharded or self.objective is not None or not isinstance(self.adapters, AdapterVector):
            return None
        return GraphedLosses(self.scorer, self.adapters.use, backend)

    @override
    def on_train_end(self) -> None:
        # weights may move from now on
        self._graphed_losses = None

    @override
    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        step = self.trainer.global_step
        self._advance_scheduler(step)
        # a checkpoint from a signal handler may contain the update of a step that the trainer has not counted yet
        if self._updates == step and not self._exceeds_budget(step):
            with self._measured(batch, step):
                self._update_adapters(batch, step)
        optimizer = self.optimizers()
        assert not isinstance(optimizer, list)
        self.manual_backward(self.anchor.sum() * 0.0)
        optimizer.step()
        self._advance_scheduler(step + 1)
        self.trainer.should_stop |= self._exceeds_budget(step + 1)

    def _cached_bytes(self) -> int:
        return 0 if self.scorer.prefix is None else self.scorer.prefix.num_bytes

    def _measured(self, batch: dict[str, Tensor], step: int) -> AbstractContextManager[None]:
        if self._step_cost.is_reported:
            return nullcontext()
        num_steps = num_training_steps(self.trainer)
        num_left = None if num_steps is None else num_steps - step
        return self._step_cost.measured(
            self.estimator.num_forwards(self.num_queries(step)), len(batch["input_ids"]), num_left
        )

    @override
    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        # after the callbacks: an average of counters and moments is none
        for averaged in averaged_modules(self.trainer):
            for name in _STATES:
                averaged.get_buffer(name).copy_(self.get_buffer(name))

    @override
    def on_validation_epoch_start(self) -> None:
        super().on_validation_epoch_start()
        self._expect_swapped_adapters()

    @override
    def on_test_epoch_start(self) -> None:
        super().on_test_epoch_start()
        self._expect_swapped_adapters()

    @override
    def on_predict_epoch_start(self) -> None:
        self._expect_swapped_adapters()

    def _expect_swapped_adapters(self) -> None:
        if isinstance(self.adapters, AdapterVector):
            self.adapters.clear_cache()

    def _advance_scheduler(self, step: int) -> None:
        scheduler = self.lr_schedulers()
        if isinstance(scheduler, LRScheduler) and scheduler.last_epoch < step:
            scheduler.step()

    def num_queries(self, step: int) -> int:
        """Return the number of queries of the next step, by its epoch and by the slopes of earlier steps."""
        assert self.adapters is not None
        epoch = int(step // self.trainer.num_training_batches)
        return self.schedule.num_queries(epoch, self.adapters.get_buffer("schedule_states"))

    @property
    def step_budget(self) -> int | None:
        """Number of steps that `max_forwards` allows, if later steps have as many queries as the next one."""
        if self.max_forwards is None or self.adapters is None:
            return None
        step = int(self.progress[0])
        left = self.max_forwards - int(self.progress[1])
        return step + left // self.estimator.num_forwards(self.num_queries(step))

    def _exceeds_budget(self, step: int) -> bool:
        """Whether a step would exceed the budget of forward passes."""
        if self.max_forwards is None:
            return False
        return int(self.progress[1]) + self.estimator.num_forwards(self.num_queries(step)) > self.max_forwards

    def _update_adapters(self, batch: dict[str, Tensor], step: int) -> None:
        assert self.adapters is not None
        num_queries = self.num_queries(step)
        directions = self.adapters.start_step(self.seed, step, num_queries, self.estimator.draw)
        theta, head = self.adapters.theta, self._head_gradient
        if head is not None:
            directions = head.directions(directions)
        values = self._evaluate_points(batch, directions, num_queries)
        slopes = projected_gradients(self._estimator.slopes(values))
        grad = self.estimator.gradient(theta, slopes, directions)
        if head is not None:
            assert self._rank_sync is not None
            head_grad = self._rank_sync.average_base(*head.observed(theta), len(batch["input_ids"]))
            if slopes.values:
                # the head is updated even if the slopes have no deviation, as those of adapters below a head of zeros
                grad = torch.zeros_like(theta) if grad is None else grad
                grad[head.slice] = head_grad

        learning_rate = self.trainer.optimizers[0].param_groups[0]["lr"]
        num_steps, forwards, num_updates = self.progress.tolist()
        forwards += self.estimator.num_forwards(num_queries)
        stored = [*(self.adapters.get_buffer(name) for name in ("update_states", "schedule_states")), self.progress]
        updated, update_states, schedule_states = (tensor.clone() for tensor in (theta, *stored[:2]))
        if grad is not None:
            for part, rate in self._learning_rates(learning_rate):
                self.update.step_(updated[part], grad[part], update_states[:, part], num_updates, rate)
            self.schedule.observe_(schedule_states, slopes)
        # decoupled from moments; without moments it equals weight decay in the gradient
        decay = 0.0 if grad is None else learning_rate * self.update.weight_decay
        done = self.progress.new_tensor([num_steps + 1, forwards, num_updates + (grad is not None)])
        self.adapters.apply_update(updated, decay, stored, [update_states, schedule_states, done])
        self._updates = step + 1

        self.log("train/loss", self._estimator.loss(values), prog_bar=True)
        # logging takes up to a millisecond for each value, as long as the arithmetic of a fast step
        is_end = step + 1 in (1, self.trainer.max_steps) or self._exceeds_budget(step + 1)
        if is_end or is_logging_step(self.trainer, step):
            self.log_dict(
                {
                    "zo/queries": float(num_queries),
                    "zo/forwards": float(forwards),
                    "zo/projected_grad_std": slopes.std,
                    "zo/dropped_queries": float(slopes.num_dropped),
                    "lr": learning_rate,
                }
            )
        self._count_nonfinite(bool(slopes.values), step)

    def _count_nonfinite(self, has_finite: bool, step: int) -> None:
        self._nonfinite_steps = 0 if has_finite else self._nonfinite_steps + 1
        if self._nonfinite_steps >= MAX_NONFINITE_STEPS:
            raise NonFiniteLossError(
                f"Expected finite losses, but for {self._nonfinite_steps} steps (up to step {step}) every query was "
                "nan or infinite; lower `learning_rate` or `epsilon`, and check the data and the precision"
            )

    def _learning_rates(self, learning_rate: float) -> list[tuple[slice, float]]:
        """Return slices of the trained vector, each with its learning rate."""
        if self.head.learning_rate is None:
            return [(slice(None), learning_rate)]
        assert self.adapters is not None
        head = self.adapters.linears_slice
        return [
            (slice(head.start), learning_rate),
            (head, learning_rate * self.head.learning_rate / self.learning_rate),
        ]

    def _evaluate_points(self, batch: dict[str, Tensor], directions: Directions, num_queries: int) -> Tensor:
        """Return the values of all points of a step `(V, P)`, on the CPU and the same bits on every rank."""
        assert self.adapters is not None
        theta, num_points = self.adapters.theta, self._estimator.num_points(num_queries)
        with torch.no_grad(), evaluation_mode(self._backbone_modules):
            prepared = self.scorer.prepare(batch)
            assert self._rank_sync is not None
            points = self._rank_sync.local_points(num_points)
            losses: LossFn = partial(self.losses, prepared=prepared)
            if self._head_gradient is not None:
                self._head_gradient.clear()
                if points[:1] == [0]:
                    observe = partial(self._observe_base, labels=batch["label"])
                    losses = partial(self.losses, prepared=prepared, on_scores=observe)
            evaluations = self._estimator.evaluate(losses, theta, directions, points, self.query_chunk_size)
        self.query_chunk_size = evaluations.chunk_size
        probe = self.adapters.drift_probe()
        # the only place where the host waits for the forward passes
        return self._rank_sync.gather(evaluations, num_points, probe, batch["input_ids"]).cpu()

    def _observe_base(self, theta_Pd: Tensor, scores: Scores, labels: Tensor) -> None:
        """Compute the head's gradient in the first forward, whose first vector is the base of one-sided slopes."""
        assert self._head_gradient is not None
        assert scores.features is not None
        if not self._head_gradient.is_observed:
            features_BD = scores.features.unflatten(0, (len(theta_Pd), -1))[0]
            self._head_gradient.observe(features_BD, scores.values[0], labels)

    def losses(
        self, theta_Pd: Tensor, prepared: Prepared, on_scores: Callable[[Tensor, Scores], None] | None = None
    ) -> Tensor:
        """Return the losses `[P]` of a batch under P adapter vectors. Override it to minimise anything else.

        Args:
            theta_Pd: The vectors.
            prepared: The batch, prepared by the scorer.
            on_scores: Called with vectors and their scores; given if the head has an exact gradient.
        """
        assert self.adapters is not None
        losses = []
        for part in theta_Pd.split(self.scorer.max_repeats(prepared) if self.adapters.folds_queries else 1):
            observe = None if on_scores is None else partial(on_scores, part)
            differentiated = torch.is_grad_enabled() or forward_ad.unpack_dual(part).tangent is not None
            if self._graphed_losses is not None and not differentiated:
                losses.append(self._graphed_losses(part, prepared, observe))
                continue
            with self.adapters.use(part):
                losses.append(
                    objective_losses(self.objective, self.scorer, prepared, len(part), self.tokenizer, observe)
                )
        return torch.cat(losses)

    # -- checkpoints and saved adapters

    @property
    def backbone_key(self) -> str:
        """Key of the backbone, pruned or not, that the adapters belong to."""
        return str(self._backbone_description.get("backbone_key", ""))

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Remove the frozen backbone from the checkpoint, and add what identifies the run."""
        for key, state in model_states(checkpoint):
            checkpoint[key] = {name: state[name] for name in state if self._is_saved(name)}
        if "current_model_state" in checkpoint:
            checkpoint["state_dict"] |= {name: checkpoint["current_model_state"][name] for name in _STATES}
        checkpoint["zeroth_order"] = {
            "trainable": type(self.trainable).__name__,
            **self._description(),
            **self._rules(),
            **describe_rates(self._new_optimizer(), self.lr_scheduler),
            "query_chunk_size": self.query_chunk_size,
            "nonfinite_steps": self._nonfinite_steps,
            "directions_drawn_by": drawn_by(self.device),
            "theta_sum": self._theta_sum(),
        }

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that the checkpoint fits this run, and restore what is not in the state dict."""
        saved = require_checkpoint_of("zeroth_order", checkpoint)
        here = self._description() | self._rules()
        if attached_trainer(self) is not None and self.trainer.training:
            here |= describe_rates(self._new_optimizer(), self.lr_scheduler)
        require_same(saved, here)
        if "state_dict" in checkpoint:
            expected = {name for name in self.state_dict() if self._is_saved(name)}
            found = set(checkpoint["state_dict"])
            if expected != found:
                raise ValueError(
                    f"Expected a checkpoint with exactly {sorted(expected)}, but it lacks {sorted(expected - found)} "
                    f"and has {sorted(found - expected)} in addition"
                )
        elif self._theta_sum() != saved["theta_sum"]:  # DeepSpeed has loaded its own file by now
            raise ValueError("Expected the checkpoint's adapters to be loaded, but they differ; is a file missing?")
        self.query_chunk_size = saved["query_chunk_size"]
        self._nonfinite_steps = saved["nonfinite_steps"]
        # the CPU drew those of adapters before checkpoints recorded it
        self._drawn_by = saved.get("directions_drawn_by", "cpu")
        if "current_model_state" in checkpoint:
            # WeightAveraging loads both states, and expects the frozen weights in them
            for key, state in model_states(checkpoint):
                checkpoint[key] = {**self.state_dict(), **state}

    def save_adapters(self, directory: str | Path, backbone: str | None = None) -> None:
        """Save the adapters (LoRA in the format of peft), their description (`adapters.json`) and a model card.

        Args:
            directory: Directory to write to; it is made if it is missing.
            backbone: Directory inside it to which the pruned backbone was written, for the card to name.

        Raises:
            ValueError: If there are none, because the model's own weights are trained.
        """
        assert self.adapters is not None
        description = self.adapters.description() | written_backbone(self._backbone_description, backbone)
        save_adapter_files(Path(directory), self.adapters, description)

    def load_adapters(self, directory: str | Path) -> None:
        """Load adapters that `save_adapters` wrote for the same backbone and sites.

        Args:
            directory: Directory with the adapters.

        Raises:
            ValueError: If they are for another backbone or other sites.
        """
        if self.adapters is None:
            self._insert_adapters()
        assert self.adapters is not None
        load_adapter_files(Path(directory), self.adapters, self._description())

    def _description(self) -> dict[str, Any]:
        assert self.adapters is not None
        return {**self.adapters.description(), "backbone_key": self.backbone_key}

    def _rules(self) -> dict[str, Any]:
        return {"update": type(self.update).__name__, "schedule_states": self.schedule.num_states}

    def _theta_sum(self) -> float:
        assert self.adapters is not None
        return float(self.adapters.drift_probe().double().sum())

    @override
    def _is_saved(self, name: str) -> bool:
        assert self.adapters is not None
        inner = name.removeprefix("backbone.")
        return inner == name or inner in self.adapters.parameter_names


def _check_schedule(schedule: QuerySchedule, estimator: Estimator, max_forwards: int | None) -> None:
    if schedule.min_queries < estimator.min_queries:
        raise ValueError(
            f"Expected argument `schedule` to have at least {estimator.min_queries} queries in every step, because "
            f'aggregation="{estimator.aggregation}" divides by their standard deviation, but got {schedule}'
        )
    smallest = estimator.num_forwards(schedule.min_queries)
    check_range(
        "max_forwards", max_forwards, max_forwards is None or max_forwards >= smallest, f"at least {smallest}, one step"
    )


def _check_objective(objective: Objective | None, estimator: Estimator) -> None:
    if objective is None:
        return
    check_objective(objective)
    name = type(objective.metric if isinstance(objective, GeneratedText) else objective).__name__
    if estimator.needs_differentiable_loss:
        raise ValueError(
            f"Expected argument `estimator` to be TwoSided or OneSided for the objective {name}, but got "
            f"{type(estimator).__name__}; a metric is a step function and has no derivative"
        )
    if estimator.epsilon is None:
        raise ValueError(
            f"Expected argument `epsilon` of `estimator` to be set for the objective {name}, but got None; a metric is "
            "a step function, and with the small default both sides have the same value: try 0.1"
        )


def _check_trainable(trainable: Trainable, estimator: Estimator, loading: LoadingOptions) -> None:
    if loading.num_classes is not None and not trainable.trains_new_head:
        raise ValueError(
            "Expected argument `parts` to be all or biases_and_head for a model with `num_classes`, but got 'biases', "
            "which leaves the new head at zero"
        )
    if trainable.has_explicit_directions:
        return
    kind = type(estimator).__name__
    for name, value, fits, known in (
        ("estimator", kind, not estimator.needs_differentiable_loss, "TwoSided or OneSided"),
        ("directions", estimator.directions, estimator.directions == "gaussian", "gaussian"),
        ("aggregation", estimator.aggregation, estimator.aggregation != "align", "mean or fzoo"),
    ):
        if not fits:
            raise ValueError(
                f"Expected argument `{name}` to be {known} if `{type(trainable).__name__}` are trained, but got "
                f"{value!r}; use {known}, or train adapters"
            )


def _check_head(
    head: TrainedHead,
    trainable: Trainable,
    objective: Objective | None,
    estimator: Estimator,
    loading: LoadingOptions,
) -> None:
    kind = type(trainable).__name__
    if head.num_answers is not None and loading.num_classes is not None:
        raise ValueError("Expected either `num_classes`, for an encoder, or `num_answers`, for a language model")
    if head.num_answers is not None and not trainable.supports_answers:
        raise ValueError(
            f"Expected `trainable` to be TensorTrainAdapters for a head with `num_answers`, but got {kind}; the saved "
            "files of others cannot contain the head"
        )
    if head.num_answers is None and loading.num_classes is None:
        raise ValueError(
            "Expected `num_classes` or `num_answers` for argument `head`, but got neither, so there is no head to train"
        )
    if not trainable.has_separate_head:
        raise ValueError(
            f"Expected adapters in `trainable` for argument `head`, but got {kind}, which have one learning rate and "
            "no exact gradient; leave out `head`, a new head is among the weights"
        )
    if head.gradient == "estimated":
        return
    for expected, fits, reason in (
        ("no `objective`", objective is None, "a metric has no gradient"),
        ("`estimator` OneSided", estimator.evaluates_base, f"{type(estimator).__name__} has no base forward"),
        (
            "`aggregation` mean or fzoo",
            estimator.aggregation != "align",
            "the head is not in the span of the directions that align projects on",
        ),
    ):
        if not fits:
            raise ValueError(f'Expected {expected} for a head with gradient="exact", but {reason}; change either')
