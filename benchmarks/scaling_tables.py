"""What docs/scaling.md shows of `benchmarks/scaling.py` and of the cost model."""

from statistics import median
from typing import Any

from cost_model import (
    SHAPES,
    activation_bytes,
    adapter_bytes,
    gathered_weights,
    resident_weights,
)
from tables import rows

from wandazeta.adapters.layout import AdapterLayout

MEASURED_HEADING = ["", "processes", "seconds", "predicted", "bytes exchanged"]
PROJECTED_HEADING = ["", "GPUs", "seconds", "bytes exchanged"]
MEMORY_HEADING = ["GiB of each GPU", "weights", "gathered", "adapters", "activations", "in all"]
JOBS = {"zo": "a step of 16 queries", "prune": "Wanda"}
# model, GPUs, whether sharded, whether in CPU memory; in bfloat16
EXAMPLES = {
    "7B on one card of 24 GB": ("llama-7b", 1, False, False),
    "7B on eight GPUs, sharded": ("llama-7b", 8, True, False),
    "70B on one card of 80 GB, offloaded": ("llama-70b", 1, True, True),
    "70B on two nodes of eight": ("llama-70b", 16, True, False),
}
COPIES, PROMPTS, TOKENS = 4, 16, 256


def scaling_table(result: dict[str, Any]) -> str:
    """Measured seconds of one, two and four processes, and what the cost model says to them."""
    hardware = result["hardware"]
    repeats = len(result["records"][0]["seconds"])
    return (
        f"{rows(MEASURED_HEADING, measured_rows(result['records']))}\n\nSmolLM2-135M in float32, gloo, one thread a "
        f"process, {hardware['cores']} cores of {hardware['cpu']}; medians of {repeats} runs, the lowest and the "
        "highest in brackets."
    )


def projection_table(result: dict[str, Any]) -> str:
    """The cost model with figures of GPUs that nobody has measured here."""
    return rows(PROJECTED_HEADING, projected_rows(result["records"]))


def memory_table(result: dict[str, Any]) -> str:
    """Memory of the worked examples, by the formulas."""
    return (
        f"{rows(MEMORY_HEADING, memory_rows())}\n\nbfloat16, {PROMPTS} prompts of {TOKENS} tokens, {COPIES} perturbed "
        "copies in a forward, tensor trains of rank 5 at three places of every block."
    )


def measured_rows(records: list[dict[str, Any]]) -> list[list[str]]:
    """A row for each job and number of processes: the median, the lowest and the highest of its runs."""
    return [
        [
            f"{JOBS[r['job']]}{', a block' if r['job'] == 'prune' else ''}",
            str(r["processes"]),
            f"{median(r['seconds']):.2f} ({min(r['seconds']):.2f} to {max(r['seconds']):.2f})",
            f"{r['seconds_predicted']:.2f}",
            f"{r['bytes_exchanged']:,.0f}",
        ]
        for r in records
        if not r["projected"]
    ]


def projected_rows(records: list[dict[str, Any]]) -> list[list[str]]:
    """A row for each job, model and number of GPUs."""
    return [
        [
            f"{JOBS[r['job']]}, {r['model']}{', sharded' if r['job'] == 'zo' and r['sharded'] else ''}",
            str(r["gpus"]),
            f"{r['seconds']:.2g}",
            f"{r['bytes_exchanged']:,.0f}",
        ]
        for r in records
        if r["projected"]
    ]


def memory_rows() -> list[list[str]]:
    """What each of the examples needs, by the formulas."""
    found = []
    for name, (model, gpus, sharded, offloaded) in EXAMPLES.items():
        shape = SHAPES[model]
        trained = AdapterLayout([shape.hidden, shape.hidden, shape.hidden] * shape.layers, 5, 64, (3, 3))
        parts = [
            0 if offloaded else resident_weights(shape, 2, gpus, sharded),
            gathered_weights(shape, 2) if sharded else 0,
            adapter_bytes(trained.num_parameters, COPIES),
            activation_bytes(shape, COPIES * PROMPTS * TOKENS, 2),
        ]
        found.append([name, *(f"{part / 2**30:.2f}" for part in (*parts, sum(parts)))])
    return found
