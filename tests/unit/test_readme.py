import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from helpers.tokenizer import byte_tokenizer

from wandazeta.cli import functions
from wandazeta.cli.help import is_function
from wandazeta.cli.main import main
from wandazeta.models.loading import load_tokenizer

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
DOCS = sorted((ROOT / "docs").rglob("*.md"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS]
FINE_TUNE = (ROOT / "docs" / "fine_tune.md").read_text()


@pytest.fixture
def render(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import render

    return render


def test_the_code_prints_what_is_shown_in_an_empty_folder_and_again_there(tmp_path):
    code, output = re.search(r"```python\n(.*?)```\n\n```\n(.*?)```", README, flags=re.DOTALL).groups()
    (tmp_path / "example.py").write_text(code)
    # run as a user does: the checkout is not on the path
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "example.py"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.endswith(output)
    assert "Loaded the pruning in 'runs/pruned'" in done.stdout + done.stderr


def test_readme_is_short():
    assert len(README.split()) <= 1250
    (table,) = re.findall(r"<!-- summary: written by [^>]*-->\n(.*?)\n\n", README, flags=re.DOTALL)
    assert len(table.splitlines()) <= 2 + 8


def test_the_tables_are_those_of_the_result_files(render):
    texts = {page: (ROOT / page).read_text() for page in render.PAGES}
    for page, text in texts.items():
        assert render.rendered(text) == text, page
    markers = [name for text in texts.values() for name in re.findall(r"<!-- (\w+): written by", text)]
    # a table appears with its first records
    assert sorted(markers) == sorted(
        name
        for name, (results, _) in render.BLOCKS.items()
        if all((render.RESULTS / f"{result}.json").exists() for result in results)
    )


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_to_files(page):
    for link in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if link.startswith("https://"):
            continue
        name, _, heading = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        if heading:
            headings = [line.strip("# ").lower() for line in target.read_text().splitlines() if line.startswith("#")]
            assert heading in [re.sub(r"[^\w -]", "", text).replace(" ", "-") for text in headings], link


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_pages_name_files_and_folders_that_exist(page):
    roots = "benchmarks|callbacks|configs|datamodules|docs|examples|modules|tests|wandazeta"
    for name in re.findall(rf"(?<![\w./])(?:{roots})/[\w/.-]*\w/?", page.read_text()):
        if "experiments.py" not in name:  # in the history only
            assert (ROOT / name).exists(), name


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_pages_name_objects_that_exist(page):
    import pkgutil

    for name in re.findall(r"\bwandazeta(?:\.\w+)+", page.read_text()):
        pkgutil.resolve_name(name)


@pytest.mark.parametrize("folder", ["docs", "docs/reference"])
def test_the_index_lists_every_page(folder):
    index = (ROOT / folder / "README.md").read_text()
    for page in (ROOT / folder).glob("*.md"):
        assert page.name == "README.md" or f"({page.name})" in index, page


def pages_of(navigation):
    for entry in navigation:
        if isinstance(entry, str):
            yield entry
        else:
            for value in entry.values():
                yield from [value] if isinstance(value, str) else pages_of(value)


def test_the_navigation_of_the_site_has_every_page():
    navigation = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    assert sorted(pages_of(navigation)) == sorted(str(page.relative_to(ROOT / "docs")) for page in DOCS)


def test_the_reference_has_every_part_that_a_user_imports():
    pages = "".join(
        (ROOT / "docs" / "reference" / f"{page.stem}.md").read_text() for page in DOCS if "reference" in page.parts
    )
    named = set(re.findall(r"^::: (\S+)", pages, flags=re.MULTILINE))
    import wandazeta

    assert named >= {f"wandazeta.{name}" for name in wandazeta.__all__ if not name.startswith("_")}
    rooms = ("adapters", "callbacks", "datamodules", "modules", "protocols", "pruning", "zeroth_order")
    assert named >= {f"wandazeta.{room}" for room in rooms}


def test_links_out_of_the_docs_lead_to_the_repository_on_the_site(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs")
    import repository_links

    config = SimpleNamespace(repo_url="https://example.org/a/b/")

    def shown(markdown, page):
        return repository_links.on_page_markdown(markdown, SimpleNamespace(file=SimpleNamespace(src_uri=page)), config)

    assert shown("[a](../README.md#install)", "b.md") == "[a](https://example.org/a/b/blob/main/README.md#install)"
    assert shown("[a](../../configs)", "reference/b.md") == "[a](https://example.org/a/b/blob/main/configs)"
    for link in ("[a](../b.md)", "[a](c.md)", "[a](https://example.org/../c)"):
        assert shown(link, "reference/b.md") == link


def test_the_page_on_protocols_names_all_of_them():
    from wandazeta import protocols

    page = (ROOT / "docs" / "bring_your_own.md").read_text()
    assert set(re.findall(r"^\| `(\w+)` \|", page, flags=re.MULTILINE)) == set(protocols.__all__)


def commands(page, command):
    """The arguments of every `wandazeta` command in a page's bash blocks, with continued lines joined."""
    blocks = re.findall(r"```bash\n(.*?)```", page, flags=re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(line)[1:] for line in lines if line.startswith(f"wandazeta {command} ")]


@pytest.fixture
def parsed(monkeypatch, capsys):
    """Return the config that a command results in."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("sys.argv", ["wandazeta"])

    def parse(arguments):
        with pytest.raises(SystemExit, match="0"):
            main([*arguments, "--print_config"])
        return yaml.safe_load(capsys.readouterr().out)

    return parse


def test_configs_that_prune_do_not_share_their_progress(parsed):
    prune = (ROOT / "docs" / "prune.md").read_text()
    runs = [parsed(arguments) for arguments in commands(prune, "prune") if not is_function(arguments)]
    folders = [run["run_dir"] for run in runs]
    assert None not in folders
    assert len(set(folders)) == len(folders) >= 3


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_parse(page, parsed):
    for command in ("fit", "prune", "diagnose", "test", "evaluate", "export-adapters"):
        for arguments in commands(page.read_text(), command):
            if is_function(arguments):
                assert functions.parse(arguments)
            elif "--model.help" not in arguments:
                assert parsed([argument for argument in arguments if argument != "--print_config"])


def test_the_recipe_with_the_papers_settings_takes_a_model_without_llamas_token(parsed, tmp_path):
    (recipe,) = (r for r in commands(FINE_TUNE, "fit") if "configs/finetune/adazeta_paper.yaml" in r)
    byte_tokenizer((" good",)).save_pretrained(tmp_path)
    pad_token = parsed(recipe)["model"]["init_args"]["loading"]["pad_token"]
    assert load_tokenizer(str(tmp_path), pad_token=pad_token).pad_token is not None
    with pytest.raises(ValueError, match="`pad_token`"):
        load_tokenizer(str(tmp_path), pad_token="</s>")


def test_the_recipe_of_the_encoder_comes_with_the_command_for_its_samples(parsed):
    settings = parsed(["fit", "-c", "configs/finetune/encoder.yaml"])
    folder, name = os.path.split(settings["model"]["init_args"]["model_name_or_path"])
    text = settings["data"]["init_args"]["source"].removeprefix("sample:")
    command = f"WANDAZETA_CACHE={folder} python -m wandazeta.data.samples {name} {text}"
    assert f"{command}\nwandazeta fit -c configs/finetune/encoder.yaml\n" in FINE_TUNE


def test_no_page_says_of_a_benchmark_with_results_that_it_has_not_been_run(render):
    assert (render.RESULTS / "finetune.json").exists()
    for page in PAGES:
        assert "not been run yet" not in page.read_text().replace("the others have not been run yet", ""), page


def test_every_method_and_task_has_a_name_beside_its_curve(render):
    trained = [r for r in render.load("finetune")["records"] if r["phase"] == "final" and r["curve"]]
    assert {r["method"] for r in trained} <= set(render.METHOD_NAMES)
    assert {r["model"] for r in trained} <= set(render.MODEL_NAMES)
    assert {r["task"] for r in trained} <= set(render.TASK_NAMES)


def test_names_beside_curves_keep_their_distance_and_order(render):
    places = render.spread_out([0.95, 0.5, 0.94, 0.2], distance=0.1, lowest=0.2, highest=1.0)
    assert places == pytest.approx([1.0, 0.5, 0.9, 0.2])
    assert render.spread_out([0.3, 0.6], distance=0.1, lowest=0.2, highest=1.0) == [0.3, 0.6]


def words(picture):
    """All labels and numbers in a picture of matplotlib, which draws text as shapes and adds it as comments."""
    return re.findall("<!-- (.*) -->", picture.read_text())


def test_the_words_of_the_pictures_are_those_of_the_result_files(render, tmp_path):
    render.demo_bars(render.load("demo_seeds"), tmp_path / "demo.svg")
    render.finetune_curves(render.load("finetune"), tmp_path / "finetune.svg")
    for name in ("demo.svg", "finetune.svg"):
        assert words(tmp_path / name) == words(ROOT / "docs" / name)
