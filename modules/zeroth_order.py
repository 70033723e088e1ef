"""Fine-tuning with forward passes alone, as a LightningModule that stock strategies run (AdaZeta, arXiv 2406.18060)."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LRScheduler
from typing_extensions import override

from wandazeta.adapters import (
    AdaptedModule,
    AdapterVector,
    InPlaceWeights,
    LoRAAdapters,
    TensorTrainAdapters,
    Weights,
    train_linears,
)
from wandazeta.adapters.files import describe_backbone
from wandazeta.models.blocks import find_blocks
from wandazeta.models.loading import LoadingOptions
from wandazeta.models.modes import evaluation_mode
from wandazeta.models.zero3 import is_shared_out
from wandazeta.modules.checkpoints import TrainedByForwards
from wandazeta.modules.exchange import Exchange, adjust_strategy, require_whole_weights
from wandazeta.modules.shares import hold_two_blocks
from wandazeta.modules.zo_options import (
    EPSILON,
    check_finite_steps,
    check_weights_options,
    check_zo_options,
    compute_dtype,
    make_estimator,
    warn_of_waste,
)
from wandazeta.scoring.head_scorer import HeadScorer
from wandazeta.scoring.objectives import GeneratedText, Objective, check_objective, objective_losses
from wandazeta.scoring.prefix import FrozenPrefix
from wandazeta.scoring.scorer import Prepared
from wandazeta.utilities.arguments import check_range, stepped
from wandazeta.zeroth_order import (
    AGGREGATIONS,
    DISTRIBUTIONS,
    AdaZetaSchedule,
    ConstantSchedule,
    Directions,
    LossFn,
    RAdaZOUpdate,
    SGDUpdate,
    VarianceSchedule,
    projected_gradients,
)
from wandazeta.zeroth_order.head import (
    HeadGradient,
    answers_head,
    check_head_gradient,
    check_head_learning_rate,
    check_num_answers,
)


class ZerothOrderModule(TrainedByForwards):
    """A language model trained by forward passes alone: adapters (and a new head, if it has one), or its weights.

    The backbone is frozen. Every step draws Q directions from (seed, step, query), measures the slope of the loss along
    each and moves the adapters by the mean of the slopes (by default two-sided Gaussian SPSA with plain SGD). The
    stored adapters are never perturbed: perturbed copies go to the forward, folded into the batch. All adapters live in
    one flat fp32 buffer that no strategy shards; a trainable parameter of one value gives strategies the optimizer that
    they ask for, whose learning rate and scheduler are the real ones.

    Args:
        model_name_or_path: Hugging Face name or local directory of a causal language model, or of an encoder.
        loading: Precision, attention kernels, pad token and other options of loading; see `LoadingOptions`.
        num_answers: Answer options of a language model to train a matrix and a bias for, which add to their scores from
            the state that the answer begins at; zero at first, so that training begins with the prompt's own answers.
        objective: What is lowered: one minus a metric of torchmetrics (scores and labels), or of `GeneratedText`; by
            default the cross-entropy. A metric moves in jumps: it needs an `epsilon` of its own and large batches.
        schedule: Number of queries of a step, `ConstantSchedule`, `AdaZetaSchedule` (by the epoch) or
            `VarianceSchedule` (more when the slopes get small).
        estimator: How slopes are measured: `two_sided` differences (2 forwards a query), `one_sided` ones that share
            their base (1 a query and 1 more) or `forward_mode` derivatives, exact (counted as 2 a query).
        directions: Distribution of the directions, `gaussian` (the paper's) or `rademacher`.
        head_gradient: Of a new head, or of answers: `estimated` along the directions like all else, or `exact`, which
            the base of `one_sided` slopes gives in closed form.
        aggregation: How slopes become a gradient: their `mean` (the paper's), `align` (projection on the span of the
            directions) or `fzoo` (mean over the slopes' standard deviation).
        update: Rule that moves the adapters by the estimated gradient, `SGDUpdate` (the paper's) or `RAdaZOUpdate`.
        learning_rate: Learning rate of the update.
        head_learning_rate: Another for a new head or for answers, which a scheduler moves alike; zeros have to travel
            further than adapters that begin at the model itself. By default the same.
        lr_scheduler: Makes a learning rate scheduler from the optimizer; it is stepped after every training step.
        weight_decay: Weight decay of the matrices, at `learning_rate`; biases have none.
        epsilon: Distance of the perturbed copies from the adapters; by default fits the precision of the forward.
        query_chunk_size: Perturbed copies folded into one forward; halved when memory runs out.
        trainable: What is trained, `TensorTrainAdapters` (the paper's), `LoRAAdapters`, or the model's own `Weights`.
        parallel: What ranks share out, the `queries` of a step on the same batch or the `data` of its batch.
        prefix_cache: Compute what lies below the adapters once per example and keep it.
        prefix_cache_gib: Memory for that, in GiB of each process; examples beyond it are computed in every step.
        max_forwards: Forward passes after which the run ends; a step that would exceed them is not begun.
        max_nonfinite_steps: Steps in a row without any finite loss after which the run stops.
        seed: Seed of the directions and of the adapters' start.

    Raises:
        ValueError: If an argument is out of range, or does not fit the model or the trainer.
    """

    def __init__(
        self,
        model_name_or_path: str,
        loading: LoadingOptions | None = None,
        num_answers: int | None = None,
        objective: Objective | None = None,
        schedule: ConstantSchedule | AdaZetaSchedule | VarianceSchedule | None = None,
        estimator: Literal["two_sided", "one_sided", "forward_mode"] = "two_sided",
        directions: Literal["gaussian", "rademacher"] = "gaussian",
        head_gradient: Literal["estimated", "exact"] = "estimated",
        aggregation: Literal["mean", "align", "fzoo"] = "mean",
        update: SGDUpdate | RAdaZOUpdate | None = None,
        learning_rate: float = 1e-4,
        head_learning_rate: float | None = None,
        lr_scheduler: Callable[[Optimizer], LRScheduler] | None = None,
        weight_decay: float = 0.0,
        epsilon: float | None = None,
        query_chunk_size: int = 16,
        trainable: TensorTrainAdapters | LoRAAdapters | Weights | None = None,
        parallel: Literal["queries", "data"] = "queries",
        prefix_cache: bool = True,
        prefix_cache_gib: float = 4.0,
        max_forwards: int | None = None,
        max_nonfinite_steps: int = 10,
        seed: int = 0,
    ) -> None:
        check_range("learning_rate", learning_rate, learning_rate > 0, "above 0")
        check_range("weight_decay", weight_decay, weight_decay >= 0, "at least 0")
        check_range("query_chunk_size", query_chunk_size, query_chunk_size >= 1, "at least 1")
        check_range("parallel", parallel, parallel in ("queries", "data"), "queries or data")
        check_range("prefix_cache_gib", prefix_cache_gib, prefix_cache_gib >= 0, "at least 0")
        check_range("max_nonfinite_steps", max_nonfinite_steps, max_nonfinite_steps >= 1, "at least 1")
        loading = loading or LoadingOptions()
        loading.refuse("stream_weights", type(self).__name__, "it is for `prune` with LanguageModel")
        num_classes = loading.num_classes
        schedule = schedule or ConstantSchedule(8)
        check_zo_options(schedule, estimator, directions, aggregation, epsilon, max_forwards)
        check_objective(objective, epsilon, estimator)
        check_num_answers(num_answers, num_classes, trainable)
        num_trained = num_classes if num_answers is None else num_answers
        weights = isinstance(trainable, Weights)
        check_head_gradient(head_gradient, num_trained, objective, estimator, aggregation, weights)
        check_head_learning_rate(head_learning_rate, num_trained, weights)
        if isinstance(trainable, Weights):
            check_weights_options(estimator, directions, aggregation, trainable.parts, num_classes)
        super().__init__(model_name_or_path, loading)
        if self.tokenizer.pad_token is None:
            raise ValueError(
                f"Expected the tokenizer of {model_name_or_path} to have a pad token, but it has none; "
                f"set `pad_token`, for example to {self.tokenizer.eos_token!r}"
            )
        self.automatic_optimization = False
        self.strict_loading = False
        self.objective = objective
        self.schedule, self.estimator = schedule, estimator
        self.directions, self.aggregation = directions, aggregation
        self.num_answers = num_answers
        self.head_gradient = head_gradient
        self.update_rule = update or SGDUpdate()
        self.learning_rate = learning_rate
        self.head_learning_rate = head_learning_rate
        self.lr_scheduler = lr_scheduler
        self.weight_decay = weight_decay
        self.epsilon = epsilon
        self.query_chunk_size = query_chunk_size
        self.trainable = trainable or TensorTrainAdapters()
        self.parallel = parallel
        self.prefix_cache = prefix_cache
        self.prefix_cache_gib = prefix_cache_gib
        self.max_forwards = max_forwards
        self.max_nonfinite_steps = max_nonfinite_steps
        self.seed = seed

        self.pruned_backbone_key = None
        self._backbone_description = {}
        self.adapters = None
        self.anchor = nn.Parameter(torch.zeros(1))  # DeepSpeed cannot broadcast one of no dimension
        # steps, forwards and updates (steps that had an estimate): buffers, so that all is written in one go
        self.register_buffer("progress", torch.zeros(3, dtype=torch.int64))
        self._updates = self._nonfinite_steps = 0
        if not loading.shard_on_load:
            self.trainable.check(self.backbone, self.update_rule.num_states)

    @property
    def data_sharding(self) -> tuple[int, int]:
        """How the training data are shared out: (number of replicas, index of this one)."""
        if self.parallel == "queries" or self._trainer is None:
            return 1, 0
        return self.trainer.world_size, self.trainer.global_rank

    @override
    def setup(self, stage: str) -> None:
        """Freeze the backbone, which may have been pruned by now, and put the adapters in."""
        if stage == "fit" and isinstance(self.trainable, Weights):
            require_whole_weights(self.trainer.strategy)
        if self._trainer is not None:
            adjust_strategy(self._trainer.strategy)
        if self._build_in_shares():
            self.trainable.check(self.backbone, self.update_rule.num_states)
        if self._trainer is not None:
            hold_two_blocks(self._trainer.strategy, self.backbone)
        if self.adapters is None:
            self._insert_adapters()

    def _insert_adapters(self) -> None:
        self._backbone_description = describe_backbone(self.backbone, self.pruned_backbone_key)
        self.backbone.requires_grad_(False)
        self.adapters = self.trainable.insert(self.backbone, self.seed)
        if isinstance(self.adapters, AdapterVector) and isinstance(self.scorer, HeadScorer):
            train_linears(self.backbone, self.adapters, ["head"])
        if isinstance(self.adapters, AdapterVector) and self.num_answers is not None:
            config: Any = self.backbone.config
            answers = answers_head(config.get_text_config().hidden_size, self.num_answers)
            self.adapters.append({"answers": answers})
            self.scorer.answers = partial(self.adapters.linear, "answers")
        states = torch.zeros(self.update_rule.num_states, len(self.adapters.theta))
        # in the bank, which keeps its precision whatever the strategy casts to
        self.adapters.register_buffer("update_states", states)
        self.adapters.register_buffer("schedule_states", torch.zeros(self.schedule.num_states, dtype=torch.float64))
        sites: set[nn.Module] = {module for module in self.backbone.modules() if isinstance(module, AdaptedModule)}
        if isinstance(self.adapters, InPlaceWeights):
            self.scorer.head_rows = self.adapters.rows
        elif self.prefix_cache and not isinstance(self.objective, GeneratedText):
            _, blocks = find_blocks(self.backbone)
            self.scorer.prefix = FrozenPrefix(self.backbone, blocks, sites, int(self.prefix_cache_gib * 2**30))
        # DDP would broadcast every buffer at every forward: megabytes a step, and drift would go unseen
        self._ddp_params_and_buffers_to_ignore = [name for name, _ in self.named_buffers()]
        self._backbone_modules = list(self.backbone.modules())
        rank_zero_info(f"{self.adapters.num_parameters:,} trainable values, {len(sites)} adapters")

    @property
    def compute_dtype(self) -> torch.dtype:
        """Precision of the forward."""
        return compute_dtype(str(self.trainer.precision), self.backbone)

    @override
    def configure_optimizers(self) -> Any:
        return stepped(self._new_optimizer(), self.lr_scheduler)

    @override
    def _new_optimizer(self) -> SGD:
        return SGD([self.anchor], lr=self.learning_rate)

    @override
    def on_fit_start(self) -> None:
        # under ZeRO-3 every forward gathers weights from all ranks: all must run equally many
        sharded = any(map(is_shared_out, self.backbone.parameters()))
        if isinstance(self.adapters, InPlaceWeights):
            self.adapters.require_fp32()  # a precision plugin may have cast them by now
        self._exchange = Exchange(self.trainer, self.parallel, lockstep=sharded)
        dtype = self.compute_dtype
        self._estimator = make_estimator(self.estimator, self.epsilon or EPSILON[dtype])
        self._head_gradient: HeadGradient | None = None
        if self.head_gradient == "exact":
            assert isinstance(self.adapters, AdapterVector)
            self._head_gradient = HeadGradient(self.adapters, self.scorer)
        warn_of_waste(self._estimator, self.schedule, self.parallel, self.trainer.world_size, self.epsilon, dtype)
        if sharded and self.scorer.prefix is not None:
            self.scorer.prefix = None
            rank_zero_info("The frozen prefix is not reused: the strategy shards the backbone's weights.")

    @override
    def on_train_start(self) -> None:
        step = self.trainer.global_step
        self._updates = int(self.progress[0])
        if self._updates not in (step, step + 1):
            # adapters from elsewhere start a run of their own
            self._updates = step
            self.progress[0] = step
        self.trainer.should_stop |= self._spent(step)

    @override
    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        step = self.trainer.global_step
        self._advance_scheduler(step)
        # a checkpoint written by a signal handler may hold the update of a step whose bookkeeping was still to come
        if self._updates == step and not self._spent(step):
            self._update_adapters(batch, step)
        optimizer = self.optimizers()
        assert not isinstance(optimizer, list)
        self.manual_backward(self.anchor.sum() * 0.0)
        optimizer.step()
        self._advance_scheduler(step + 1)
        self.trainer.should_stop |= self._spent(step + 1)

    def _advance_scheduler(self, step: int) -> None:
        scheduler = self.lr_schedulers()
        if isinstance(scheduler, LRScheduler) and scheduler.last_epoch < step:
            scheduler.step()

    def num_queries(self, step: int) -> int:
        """Queries of the step that comes next, by the epoch that it belongs to and by what was measured before."""
        assert self.adapters is not None
        epoch = int(step // self.trainer.num_training_batches)
        return self.schedule.num_queries(epoch, self.adapters.get_buffer("schedule_states"))

    def _spent(self, step: int) -> bool:
        """Whether the next step would exceed the forward passes that the run may spend."""
        if self.max_forwards is None:
            return False
        return int(self.progress[1]) + self._estimator.num_forwards(self.num_queries(step)) > self.max_forwards

    def _update_adapters(self, batch: dict[str, Tensor], step: int) -> None:
        assert self.adapters is not None
        num_queries = self.num_queries(step)
        directions = self.adapters.start(self.seed, step, num_queries, DISTRIBUTIONS[self.directions])
        theta, head = self.adapters.theta, self._head_gradient
        if head is not None:
            directions = head.directions(directions)
        values = self._estimate(batch, directions, num_queries)
        slopes = projected_gradients(self._estimator.slopes(values))
        learning_rate = self.trainer.optimizers[0].param_groups[0]["lr"]

        stored = [*(self.adapters.get_buffer(name) for name in ("update_states", "schedule_states")), self.progress]
        grad = AGGREGATIONS[self.aggregation](theta, slopes, directions)
        if head is not None:
            head_grad = head.take(self._exchange, len(batch["input_ids"]))
            if slopes.values:
                # slopes without a deviation, as of adapters under a head of zeros, do not hold it up
                grad = torch.zeros_like(theta) if grad is None else grad
                head.put(grad, head_grad)
        updated, update_states, schedule_states = (tensor.clone() for tensor in (theta, *stored[:2]))
        if grad is not None:
            for part, rate in self._rates(learning_rate):
                self.update_rule.step_(updated[part], grad[part], update_states[:, part], int(self.progress[2]), rate)
            self.schedule.observe_(schedule_states, slopes)
        # decoupled from the moments, and the same as in the gradient where there are none
        shrink = 0.0 if grad is None else learning_rate * self.weight_decay
        done = self.progress + self.progress.new_tensor(
            [1, self._estimator.num_forwards(num_queries), grad is not None]
        )
        self.adapters.store(updated, shrink, stored, [update_states, schedule_states, done])
        self._updates = step + 1

        self.log("train/loss", self._estimator.loss(values), prog_bar=True)
        # logging costs a good part of a millisecond a value, as much as a fast step's arithmetic
        interval: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        if (step + 1) % interval == 0 or step + 1 in (1, self.trainer.max_steps) or self._spent(step + 1):
            self.log_dict(
                {
                    "zo/queries": float(num_queries),
                    "zo/forwards": float(done[1]),
                    "zo/projected_grad_std": slopes.std,
                    "zo/dropped_queries": float(slopes.num_dropped),
                    "lr": learning_rate,
                }
            )
        self._nonfinite_steps = 0 if slopes.values else self._nonfinite_steps + 1
        check_finite_steps(self._nonfinite_steps, self.max_nonfinite_steps, step)

    def _rates(self, learning_rate: float) -> list[tuple[slice, float]]:
        """Parts of the trained vector, each with its learning rate."""
        if self.head_learning_rate is None:
            return [(slice(None), learning_rate)]
        assert isinstance(self.adapters, AdapterVector)
        end = self.adapters.layout.num_parameters
        return [
            (slice(end), learning_rate),
            (slice(end, None), learning_rate * self.head_learning_rate / self.learning_rate),
        ]

    def _estimate(self, batch: dict[str, Tensor], directions: Directions, num_queries: int) -> Tensor:
        assert self.adapters is not None
        theta, num_points = self.adapters.theta, self._estimator.num_points(num_queries)
        with torch.no_grad(), evaluation_mode(self._backbone_modules):
            prepared = self.scorer.prepare(batch)
            points = self._exchange.share(num_points)
            losses: LossFn = partial(self.losses, prepared=prepared)
            if self._head_gradient is not None:
                losses = self._head_gradient.watch(losses, batch["label"])
            evaluations = self._estimator.evaluate(losses, theta, directions, points, self.query_chunk_size)
        self.query_chunk_size = evaluations.chunk_size
        return self._exchange.gather(evaluations, num_points, self.adapters.checked(), batch["input_ids"])

    def losses(self, theta_Pd: Tensor, prepared: Prepared) -> Tensor:
        """Losses `[P]` of a batch under P adapter vectors; overridable, any number per vector will do."""
        assert self.adapters is not None
        losses = []
        for part in theta_Pd.split(self.scorer.max_repeats(prepared) if self.adapters.folds else 1):
            with self.adapters.use(part):
                losses.append(objective_losses(self.objective, self.scorer, prepared, len(part), self.tokenizer))
        return torch.cat(losses)
