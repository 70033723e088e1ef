import json
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
from helpers.reports import evaluation, made_up, with_unreached_expert

from wandazeta.pruning.records import PruneReport
from wandazeta.pruning.report.evaluation import EvaluatedModel, EvaluationSummary
from wandazeta.pruning.report.page import main, page_of_file, write_page
from wandazeta.scoring.evaluation import Evaluation, SampleText

VOID = {"meta", "br", "img", "link", "input", "hr", "col", "source"}


class Page(HTMLParser):
    """Elements, attributes and words of a page; every element must be closed in its place."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.rows, self.words, self._open = [], [], [], []
        self.feed(text)
        self.close()
        assert not self._open

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self._open.append(tag)
        if tag == "tr":
            self.rows.append([])

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if {"style", "script"} & set(self._open):
            return
        self.words.append(data)
        if "tr" in self._open and data.strip():
            self.rows[-1].append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


def written(tmp_path, report, *args, **kwargs):
    write_page(report, tmp_path / "page.html", *args, **kwargs)
    return (tmp_path / "page.html").read_text(encoding="utf-8")


def svgs(text):
    return {
        svg.get("aria-label"): svg for svg in map(ElementTree.fromstring, re.findall(r"<svg.*?</svg>", text, re.DOTALL))
    }


def test_every_block_and_layer_is_there(tmp_path):
    report = made_up(12)
    page = Page(written(tmp_path, report, model="org/model"))
    expected = [
        [str(b.index), layer.name.removesuffix(".weight"), f"{layer.sparsity:.2%}"]
        for b in report.blocks
        for layer in b.layers
    ]
    assert [[row[0], row[1], row[5]] for row in page.rows[1:]] == expected
    for words in (
        "org/model",
        f"{report.sparsity:.1%} of the weights in 24 layers are zero",
        "Tuned RO (SparseGPT and regional optimisation that tunes itself)",
        "calibrated on 4 samples with 40 tokens",
        f"{round(report.sparsity * 7680):,} of 7,680 weights",
        "2 of every 4 consecutive inputs are kept",
        "18.0 s",
        "1 GiB",
        report.gain.replace("`", " "),
        "reduced it by 50%",
    ):
        assert words in page.text
    for name, value in report.options.items():
        assert f"{name} {value if isinstance(value, str) else json.dumps(value)}" in page.text


def test_the_page_refers_to_nothing_outside(tmp_path):
    text = written(tmp_path, made_up(), evaluation=evaluation(dense=20.0))
    page = Page(text)
    for tag, attributes in page.elements:
        assert tag not in ("link", "img", "iframe", "object", "embed", "base", "image")
        assert "src" not in attributes
        for name in ("href", "xlink:href"):
            assert attributes.get(name, "#").startswith("#")
    assert not re.findall(r"@import|@font-face|url\((?!#)", text)
    policy = next(a["content"] for tag, a in page.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none';")


def test_pictures_are_svg_with_words_for_them(tmp_path):
    text = written(tmp_path, made_up(), evaluation=evaluation(dense=20.0, pruned=1000.0))
    labels = " ".join(svgs(text))
    assert len(svgs(text)) == 7
    for words in (
        "Of every 100",
        "Heat map of 3 blocks by 2",
        "RO loss of 3",
        "dense 20.00, pruned 1,000.00",
        "pruning score of 2 layer names over 3 blocks",
        " s.",
        " GiB.",
    ):
        assert words in labels
    ids = [attributes["id"] for _, attributes in Page(text).elements if "id" in attributes]
    assert len(set(ids)) == len(ids)


def test_where_all_layers_have_the_same_sparsity_the_scores_take_the_place_of_its_map(tmp_path):
    labels = " ".join(svgs(written(tmp_path, made_up(sparsity=0.5))))
    assert "Heat map" not in labels
    assert "RO loss" in labels
    assert "pruning score" in labels
    # the last row of an unstructured pattern is rounded
    report = made_up(2, sparsity=0.5)
    layers = tuple(replace(layer, sparsity=0.5001) for layer in report.blocks[1].layers)
    report = replace(report, blocks=(report.blocks[0], replace(report.blocks[1], layers=layers)))
    assert "Heat map" not in " ".join(svgs(written(tmp_path, report)))


def test_code_is_set_as_code_without_backticks(tmp_path):
    report = made_up(options={"method": "wanda", "sparsity_pattern": "2:4"})
    assert "`" in report.gain
    text = written(tmp_path, report)
    assert "`" not in Page(text).text
    assert "<code>wandazeta prune --pack true</code>" in text


def test_an_evaluation_is_shown_with_figures_and_samples(tmp_path):
    shown = Page(written(tmp_path, made_up(), evaluation=evaluation(dense=20.0, pruned=31.5)))
    assert ["dense", "20.00", "1 MiB", "0.0%"] in shown.rows
    assert ["pruned", "31.50", "1 MiB", "25.0%"] in shown.rows
    for words in ("16,384 tokens in windows of 512", "The ship was", "dense sunk 0 times.", "pruned sunk 1 times."):
        assert words in shown.text


def test_an_evaluation_by_tasks_alone_shows_what_there_is(tmp_path):
    model = EvaluatedModel("pruned", perplexity=None, size_bytes=None, sparsity=0.25, continuation=None)
    text = written(tmp_path, made_up(), evaluation=EvaluationSummary((model,), None, None, 0))
    assert ["pruned", "not measured", "25.0%"] in Page(text).rows
    assert "A sample of each model" not in text
    assert not any("Perplexities" in label for label in svgs(text))


def test_a_perplexity_that_is_infinite_is_named_but_not_drawn(tmp_path):
    text = written(tmp_path, made_up(), evaluation=evaluation(dense=20.0, pruned=float("inf")))
    assert "Perplexities: dense 20.00." in svgs(text)
    assert ["pruned", "infinite", "1 MiB", "25.0%"] in Page(text).rows
    assert not any(
        "Perplexities" in label for label in svgs(written(tmp_path, made_up(), evaluation=evaluation(a=1e999)))
    )


@pytest.mark.parametrize(
    ("width", "words"),
    [(40, "of 7,680 weights"), (2 * 10**5, "of 38.4 million weights"), (10**8, "of 19.2 billion weights")],
)
def test_large_numbers_are_short(tmp_path, width, words):
    report = made_up(12, width=width)
    assert words in Page(written(tmp_path, report)).text


def test_what_was_not_measured_is_not_drawn(tmp_path):
    text = written(tmp_path, made_up(losses=(None, None), num_samples=0, num_tokens=0, options={"method": "magnitude"}))
    assert len(svgs(text)) == 5
    assert "No loss was measured" in text
    assert "without calibration data" in text
    assert "Perplexity" not in text
    text = written(tmp_path, PruneReport({}, "model.layers"))
    assert len(svgs(text)) == 1
    assert "<table" not in text


@pytest.mark.parametrize(
    ("losses", "words"),
    [
        ((0.5, 0.5), "does not optimise the block"),
        ((0.5, 0.75), "1.5 times the value before: the optimisation did not help"),
        ((0.0, 0.0), "Mean squared error"),
    ],
)
def test_the_loss_is_put_into_words(tmp_path, losses, words):
    assert words in written(tmp_path, made_up(losses=losses))


def test_all_text_is_escaped(tmp_path):
    evil = '</script><script>alert(1)</script><b title="x">&amp;\'$a$'
    report = made_up(names=(evil,), options={evil: evil, "method": evil, "sparsity_pattern": "2:4", "list": [evil]})
    report = PruneReport(report.options, evil, report.blocks)
    harmless = {tag for tag, _ in Page(written(tmp_path, made_up(), evaluation=evaluation(a=1.0))).elements}
    text = written(tmp_path, report, evaluation=evaluation(evil, **{evil: 1.5}), model=evil)
    page = Page(text)
    assert {tag for tag, _ in page.elements} == harmless
    assert text.count("<script") == 1
    assert page.text.count(evil) >= 8
    svgs(text)


def test_the_same_report_gives_the_same_bytes(tmp_path):
    first, second = (written(tmp_path, made_up(), evaluation=evaluation(a=1.0)) for _ in range(2))
    assert first == second


@pytest.mark.parametrize("package", ["matplotlib", "jinja2"])
def test_a_missing_package_is_named(tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ModuleNotFoundError, match=rf"needs {package}; run `pip install 'wandazeta\[report\]'`"):
        write_page(made_up(), tmp_path / "page.html")


def test_the_command_makes_a_page_from_either_file(tmp_path):
    report = made_up()
    (tmp_path / "report.json").write_text(json.dumps(report.to_dict()))
    exported = {"key": "0123", "model": "org/model", **report.to_dict()}
    (tmp_path / "prune_report.json").write_text(json.dumps(exported))
    main([str(tmp_path / "report.json")])
    assert (tmp_path / "report.html").read_text() == written(tmp_path, report)
    main([str(tmp_path / "prune_report.json")])
    assert (tmp_path / "prune_report.html").read_text() == written(tmp_path, report, model="org/model")
    main([str(tmp_path / "prune_report.json"), "--model", "mine", "-o", str(tmp_path / "out.html")])
    assert (tmp_path / "out.html").read_text() == written(tmp_path, report, model="mine")


def test_the_page_of_a_file_shows_the_evaluation_beside_it(tmp_path):
    report, measured = made_up(), evaluation(dense=20.0, pruned=float("inf"))
    (tmp_path / "prune_report.json").write_text(json.dumps(report.to_dict()))
    sizes = {"num_bytes": 2**20, "num_tokens": 16384, "sequence_length": 512}
    found = None
    for index, model in enumerate(measured.models):
        sample = SampleText(measured.text, model.continuation)
        found = Evaluation(
            model.name, 10, index / 4, perplexity=model.perplexity, sample=sample, baseline=found, **sizes
        )
    (tmp_path / "evaluation.json").write_text(json.dumps(found.to_dict()))
    path = page_of_file(tmp_path / "prune_report.json")
    assert path == tmp_path / "prune_report.html"
    assert path.read_text() == written(tmp_path, report, evaluation=measured)
    for content in ("{}", "no JSON", '{"model": "a", "baseline": null}', "[1]"):
        (tmp_path / "evaluation.json").write_text(content)
        with pytest.raises(ValueError, match=r"evaluation.json' to hold an evaluation, .*run `wandazeta evaluate`"):
            page_of_file(tmp_path / "prune_report.json")


def test_the_command_says_what_is_wrong(tmp_path):
    with pytest.raises(SystemExit, match=r"error: Expected '.*none.json' to be a file that can be read \(No such file"):
        main([str(tmp_path / "none.json")])
    for content in ("{}", "[1]", "no JSON", '{"options": {}, "block_name": "x", "blocks": [1]}'):
        (tmp_path / "report.json").write_text(content)
        with pytest.raises(SystemExit, match=r"error: Expected '.*report.json' to hold the report of a pruning"):
            main([str(tmp_path / "report.json")])


def test_experts_that_no_token_reached_are_named(tmp_path):
    text = Page(written(tmp_path, with_unreached_expert(made_up()))).text
    assert "pruned by magnitude: model.layers.0.mlp.experts 2." in text
