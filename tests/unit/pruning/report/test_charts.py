import subprocess
import sys
from dataclasses import replace
from xml.etree import ElementTree

import matplotlib as mpl
import pytest
from helpers.reports import made_up

from wandazeta.pruning.report import charts

SVG = "{http://www.w3.org/2000/svg}"
BLOCKS = made_up().blocks
DRAWN = {
    "waffle": lambda: charts.waffle(0.37),
    "zeros": lambda: charts.sparsity_map(BLOCKS),
    "losses": lambda: charts.losses(BLOCKS),
    "scores": lambda: charts.score_rows(BLOCKS),
    "seconds": lambda: charts.block_bars(BLOCKS, [1.5, 0.0, 3.0], "seconds", "s"),
    "perplexities": lambda: charts.perplexity_bars({"dense": 20.0, "pruned": 31.5}),
}


def tips(svg):
    root = ElementTree.fromstring(svg)
    return {group.get("id"): group.findtext(f"{SVG}title") for group in root.iter() if group.get("class") == "tip"}


def opacity(svg, key):
    """How much of the colour a square has."""
    group = next(group for group in ElementTree.fromstring(svg).iter() if group.get("id") == key)
    style = dict(part.split(": ") for part in group.find(f"{SVG}path").get("style").split("; "))
    assert style["fill"] == "var(--accent)"
    return float(style.get("fill-opacity", 1))


@pytest.mark.parametrize("key", list(DRAWN))
def test_every_chart_is_svg_in_the_colours_of_the_page(key):
    svg = DRAWN[key]()
    root = ElementTree.fromstring(svg)
    assert root.tag == f"{SVG}svg"
    assert root.get("role") == "img"
    assert root.get("aria-label").endswith(".")
    ids = [element.get("id") for element in root.iter() if element.get("id")]
    assert len(set(ids)) == len(ids)
    assert all(name.startswith(f"{key}-") for name in ids)
    references = [value for element in root.iter() for value in element.attrib.values() if "#" in value]
    for reference in references:
        assert reference.removeprefix("url(").strip("#)") in ids
    for element in root.iter():
        assert "#" not in element.get("style", "")
        assert element.tag not in (f"{SVG}style", f"{SVG}script", f"{SVG}image")


def test_the_same_report_gives_the_same_bytes_and_leaves_matplotlib_alone():
    before = dict(mpl.rcParams)
    with mpl.rc_context({"text.usetex": True, "axes.facecolor": "#ff0000"}):  # the user's own settings
        assert DRAWN["losses"]() == DRAWN["losses"]()
        assert "#ff0000" not in DRAWN["zeros"]()
        assert mpl.rcParams["text.usetex"]
    assert dict(mpl.rcParams) == before


def test_a_waffle_has_as_many_hollow_squares_as_zeros():
    svg = DRAWN["waffle"]()
    assert svg.count("fill: var(--accent)") == 63
    assert svg.count("stroke: var(--line)") == 100
    assert "of every 100 weights, 37 are zero" in svg.lower()


def test_the_map_has_a_square_for_every_layer_deeper_with_more_zeros():
    svg = DRAWN["zeros"]()
    found = tips(svg)
    assert len(found) == 6
    assert found["zeros-cell-2-1"] == "block 2, down.weight: 40.00% zeros (2:4)"
    assert opacity(svg, "zeros-cell-0-0") < opacity(svg, "zeros-cell-0-1") < opacity(svg, "zeros-cell-2-1")
    assert "2%" not in [text.text for text in ElementTree.fromstring(svg).iter(f"{SVG}text")]
    assert "40%" in [text.text for text in ElementTree.fromstring(svg).iter(f"{SVG}text")]


def test_every_row_of_scores_has_its_own_scale_and_a_tooltip_for_every_layer():
    svg = charts.score_rows(BLOCKS)
    found = tips(svg)
    assert len(found) == 6
    assert found["scores-place-2-1"] == "block 2, down.weight: mean 2.5, standard deviation 2.25"
    texts = [text.text for text in ElementTree.fromstring(svg).iter(f"{SVG}text")]
    assert {"up", "down", " 3.8", " 4.8"} <= set(texts)  # the largest mean and standard deviation of each row


def test_scores_that_are_missing_or_no_numbers_leave_gaps():
    (other,) = made_up(1, names=("down.weight",)).blocks
    layers = tuple(replace(layer, score_mean=float("nan")) for layer in other.layers)
    blocks = (BLOCKS[0], replace(other, index=1, layers=layers))
    assert set(tips(charts.score_rows(blocks))) == {"scores-place-0-0", "scores-place-0-1", "scores-place-1-1"}


def test_a_layer_that_a_block_lacks_leaves_its_place_empty():
    blocks = (BLOCKS[0], made_up(2, names=("down.weight",)).blocks[1])
    assert set(tips(charts.sparsity_map(blocks))) == {"zeros-cell-0-0", "zeros-cell-0-1", "zeros-cell-1-1"}


def test_many_blocks_give_a_wider_map_and_no_crowded_numbers():
    svg = charts.sparsity_map(made_up(80).blocks)
    assert len(tips(svg)) == 160
    assert len(ElementTree.fromstring(svg).findall(f".//{SVG}text")) < 80


@pytest.mark.parametrize("name", ["$x^2$ & <b>", "#010101", "a\nb\x01", "x" * 300, "名前"])
@pytest.mark.filterwarnings("ignore:Glyph")
def test_names_are_only_text(name):
    for svg in (charts.perplexity_bars({name: 2.0}), charts.sparsity_map(made_up(names=(name,)).blocks)):
        texts = [text.text for text in ElementTree.fromstring(svg).iter(f"{SVG}text")]
        assert any(text.startswith(name[:1]) for text in texts)
        assert not ElementTree.fromstring(svg).findall(f".//{SVG}b")
    if name.isprintable() and len(name) < 20:
        assert name in texts


def test_losses_that_are_no_numbers_are_left_out():
    blocks = [made_up(1, losses=pair).blocks[0] for pair in ((1.0, 0.5), (None, None), (float("nan"), 1.0), (0.0, 0.0))]
    blocks = [
        type(block)(index, block.name, block.layers, block.loss_before, block.loss_after)
        for index, block in enumerate(blocks)
    ]
    assert charts.measured_losses(blocks) == {0: (1.0, 0.5), 3: (0.0, 0.0)}
    found = tips(charts.losses(blocks))
    assert found == {"losses-column-0": "block 0: 1 → 0.5", "losses-column-3": "block 3: 0 → 0"}


def test_values_far_apart_are_drawn_logarithmically():
    assert charts.is_logarithmic([1.0, 31.0])
    assert not charts.is_logarithmic([1.0, 30.0])
    assert not charts.is_logarithmic([0.0, 30.0])


def test_bars_of_perplexities_start_at_the_smallest_possible():
    texts = [
        text.text for text in ElementTree.fromstring(charts.perplexity_bars({"a": 20.0, "b": 30.0})).iter(f"{SVG}text")
    ]
    assert texts[0] == "1"
    assert ">1000<" in charts.perplexity_bars({"a": 20.0, "b": 3000.0})


def test_without_optimisation_there_is_one_series_of_losses():
    assert ">before optimisation<" in charts.losses(BLOCKS)
    assert ">before optimisation<" not in charts.losses(made_up(losses=(0.5, 0.5)).blocks)


def test_matplotlib_is_imported_when_something_is_drawn():
    program = "import sys, wandazeta.pruning.report.page; print(sorted({'matplotlib', 'jinja2'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=300)
    assert "matplotlib" not in done.stdout
