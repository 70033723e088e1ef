"""Products of 2:4 weights on torch's sparse kernels and on dense ones, for the Linears of LLaMA-7B in bfloat16.

    python benchmarks/gpu/sparse_kernels.py

Each is timed eagerly and inside a CUDA graph, which leaves out the host's work for each call. Needs a GPU.
"""

import argparse
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from prune_gpu import SHAPES
from records import RESULTS, describe, write

from wandazeta.pruning.export.semi_structured import measure_kernels
from wandazeta.pruning.method.masks import group_mask

ROWS = (16, 64, 256, 1024, 4096, 16384)


def main() -> None:
    """Measure; the result file is written after each shape."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llama-7b")
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS, help="tokens of a batch")
    parser.add_argument("--result", type=Path, default=RESULTS / "kernels_gpu.json", help="the result file")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("error: Expected a CUDA device, but torch finds none; sparse kernels run on no other")
    records: list[dict[str, Any]] = []
    for shape in dict.fromkeys(SHAPES[arguments.shape].linears.values()):
        weight = torch.randn(shape, device="cuda")
        weight = (weight * group_mask(weight.abs(), 2, 4)).bfloat16()
        for rows in arguments.rows:
            records += map(asdict, measure_kernels(weight, rows))
        write(arguments.result, describe(arguments.result.stem, records))
    for record in records:
        print(record)


if __name__ == "__main__":
    main()
