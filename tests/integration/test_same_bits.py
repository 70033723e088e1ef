"""Prunings and trainings give the results that the code gave before its restructuring, bit for bit.

`data/same_bits.json` was written by `helpers/record_same_bits.py` with the code of the commit that it names. Checksums
are compared on processors, and with versions of packages, for which there are some; elsewhere, statistics are.
"""

import json
from pathlib import Path

import pytest
from helpers.same_bits import checksum, distances, processor, run_case, run_rank_cases, statistics
from helpers.same_bits_cases import CASES, RANK_CASES

RECORD = json.loads((Path(__file__).parents[1] / "data" / "same_bits.json").read_text())
# relative to the usual size of each statistic. Other kernels of one processor changed the statistics by a tenth of
# these tolerances, and the wave by half of its own: it also changes when rounding decides which of two weights with
# nearly equal scores is pruned
TOLERANCES = {"count": 0.0, "zeros": 2e-3, "abs": 2e-3, "norm": 2e-3, "wave": 5e-2, "samples": 2e-2}
# for weights or matrix products in bfloat16
COARSE = {"count": 0.0, "zeros": 2e-3, "abs": 3e-2, "norm": 3e-2, "wave": 0.5, "samples": float("inf")}


def differences(name, groups):
    """The groups of tensors that differ from the record, each with the distances of its statistics."""
    expected, found = RECORD["figures"][name], {group: statistics(tensors) for group, tensors in groups.items()}
    assert found.keys() == expected.keys()
    far = {group: distances(expected[group], found[group]) for group in expected}
    bits = RECORD["bits"].get(processor())
    if bits is not None:
        return {group: far[group] for group, tensors in groups.items() if checksum(tensors) != bits[name][group]}
    limits = COARSE if "bfloat16" in json.dumps((CASES | RANK_CASES)[name]) else TOLERANCES
    return {group: far[group] for group in far if any(value > limits[key] for key, value in far[group].items())}


def test_every_case_was_recorded():
    names = {*CASES, *RANK_CASES}
    assert RECORD["figures"].keys() == names
    assert all(bits.keys() == names for bits in RECORD["bits"].values())


@pytest.mark.parametrize("name", CASES)
def test_the_result_is_the_same(name, tmp_path):
    assert differences(name, run_case(CASES[name], tmp_path)) == {}


@pytest.mark.slow
def test_results_of_two_ranks_are_the_same(tmp_path):
    found = run_rank_cases(tmp_path)
    assert {name: differences(name, groups) for name, groups in found.items()} == {name: {} for name in RANK_CASES}
