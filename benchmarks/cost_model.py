"""What a run costs in memory, bytes exchanged and seconds, from the shape of a model: the formulas of docs/scaling.md.

Bytes are those that tests count; seconds are a projection from a sustained speed, a bandwidth and a latency.
"""

from dataclasses import dataclass
from math import ceil

BYTES_FP64 = 8


@dataclass(frozen=True)
class Shape:
    """Sizes of a LLaMA-like model.

    Args:
        hidden: Width of the hidden states.
        layers: Decoder blocks.
        intermediate: Width inside the MLP.
        vocabulary: Tokens.
        key_value: Width of keys, and of values.
        tied: Whether the head is the table of tokens.
    """

    hidden: int
    layers: int
    intermediate: int
    vocabulary: int
    key_value: int
    tied: bool = False

    @property
    def linear_weights(self) -> int:
        """Weights of the Linears of a block."""
        return self.hidden * (2 * self.hidden + 2 * self.key_value + 3 * self.intermediate)

    @property
    def block(self) -> int:
        """Values of a block: its Linears and two norms."""
        return self.linear_weights + 2 * self.hidden

    @property
    def table(self) -> int:
        """Values of the table of tokens, and of the head."""
        return self.vocabulary * self.hidden

    @property
    def total(self) -> int:
        """Values of the model."""
        return self.layers * self.block + self.table * (1 if self.tied else 2) + self.hidden

    @property
    def input_widths(self) -> int:
        """Input features of the Linears of a block, one after the other."""
        return 6 * self.hidden + self.intermediate


SHAPES = {
    "smollm2-135m": Shape(576, 30, 1536, 49152, 192, tied=True),
    "llama-7b": Shape(4096, 32, 11008, 32000, 4096),
    "llama-70b": Shape(8192, 80, 28672, 32000, 1024),
}


@dataclass(frozen=True)
class Hardware:
    """What does the work.

    Args:
        flops: Floating point operations a second that a process sustains.
        bandwidth: Bytes a second into a process, from all others together.
        latency: Seconds of an exchange of nothing.
    """

    flops: float
    bandwidth: float
    latency: float


def resident_weights(shape: Shape, value_bytes: int, ranks: int = 1, sharded: bool = False) -> int:
    """Bytes of weights that a rank holds all the time: all of them, or its share under ZeRO stage 3."""
    return ceil(shape.total / (ranks if sharded else 1)) * value_bytes


def gathered_weights(shape: Shape, value_bytes: int) -> int:
    """Most bytes of gathered weights under ZeRO stage 3: two blocks, with the table of tokens or the head."""
    return (2 * shape.block + shape.table) * value_bytes


def adapter_bytes(num_parameters: int, copies: int, states: int = 0) -> int:
    """Most bytes of a step's vectors: the trained one and the update's states, and what comes and goes beside them.

    While losses are evaluated these are the perturbed copies and a direction; while the vector is moved, the
    gradient, and the new vector and states, which take the old ones' place in one go.

    Args:
        num_parameters: Trained values, in float32.
        copies: Perturbed copies in one forward, `query_chunk_size` at most.
        states: States of the update, 2 of `RAdaZOUpdate`.
    """
    return 4 * num_parameters * (1 + states + max(copies + 1, 2 + states))


def activation_bytes(shape: Shape, tokens: int, value_bytes: int) -> int:
    """Most bytes of activations of a forward without gradients: hidden states twice, and thrice the width of the MLP.

    Args:
        shape: The model.
        tokens: Tokens of all rows that go through at once, those of every perturbed copy.
        value_bytes: Bytes of a value.
    """
    return tokens * value_bytes * (2 * shape.hidden + 3 * shape.intermediate)


def zo_points(num_queries: int) -> int:
    """Forwards of a two-sided step."""
    return 2 * num_queries


def zo_exchanged_bytes(num_queries: int) -> int:
    """Bytes that a rank gives to the exchanges of a step: losses, a weight, twelve marks and the anchor's gradient."""
    return BYTES_FP64 * (zo_points(num_queries) + 1 + 12) + 4


def zo_seconds(
    shape: Shape,
    hardware: Hardware,
    tokens: int,
    num_queries: int,
    ranks: int,
    sharded: bool = False,
    value_bytes: int = 2,
) -> float:
    """Seconds of a two-sided step with `parallel="queries"`: the forwards of the rank that has most, and the exchange.

    Under ZeRO stage 3 the weights of the others arrive meanwhile, and the longer of the two counts.

    Args:
        shape: The model.
        hardware: What runs it.
        tokens: Tokens of the batch.
        num_queries: Queries of a step.
        ranks: Processes.
        sharded: Whether the weights are.
        value_bytes: Bytes of a weight.
    """
    forwards = ceil(zo_points(num_queries) / ranks)
    compute = forwards * 2 * shape.layers * shape.block * tokens / hardware.flops
    arriving = shape.total * value_bytes * (ranks - 1) / ranks / hardware.bandwidth if sharded else 0.0
    exchange = hardware.latency + zo_exchanged_bytes(num_queries) / hardware.bandwidth if ranks > 1 else 0.0
    return max(compute, arriving) + exchange


def wanda_exchanged_bytes(shape: Shape, value_bytes: int) -> int:
    """Bytes of tensors that a rank gives to the exchanges of a block: squares of the inputs, and the pruned weights."""
    return BYTES_FP64 * shape.input_widths + value_bytes * shape.linear_weights


def wanda_block_seconds(shape: Shape, hardware: Hardware, tokens: int, ranks: int, value_bytes: int = 2) -> float:
    """Seconds of a block: two forwards of the rank's share of the samples, and the exchange."""
    compute = 2 * 2 * shape.block * tokens / ranks / hardware.flops
    if ranks == 1:
        return compute
    # a sum and a count for each Linear's statistics, and the weights
    return compute + 3 * 7 * hardware.latency + wanda_exchanged_bytes(shape, value_bytes) / hardware.bandwidth
