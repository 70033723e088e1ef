import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from helpers.tokenizer import byte_tokenizer

from wandazeta.cli import functions
from wandazeta.cli.main import main
from wandazeta.models.loading import load_tokenizer

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
RECIPES = (ROOT / "docs" / "recipes.md").read_text()
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


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
    links = [link for link in re.findall(r"\]\(([^)]+)\)", page.read_text()) if not link.startswith("https://")]
    assert links or page.name in ("methods.md", "estimators.md", "recipes.md")
    for link in links:
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


def test_the_index_lists_every_page():
    index = (ROOT / "docs" / "README.md").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        assert page.name == "README.md" or f"({page.name})" in index, page


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


def test_recipes_that_prune_do_not_share_their_progress(parsed):
    runs = [parsed(recipe) for recipe in commands(RECIPES, "prune") if not functions.handles(recipe)]
    folders = [run["run_dir"] for run in runs]
    assert None not in folders
    assert len(set(folders)) == len(folders) >= 3


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_parse(page, parsed):
    for command in ("fit", "prune", "diagnose", "test", "evaluate", "export-adapters"):
        for arguments in commands(page.read_text(), command):
            if functions.handles(arguments):
                assert functions.parse(arguments)
            elif "--model.help" not in arguments:
                assert parsed([argument for argument in arguments if argument != "--print_config"])


def test_the_recipe_with_the_papers_settings_takes_a_model_without_llamas_token(parsed, tmp_path):
    (recipe,) = (r for r in commands(RECIPES, "fit") if "configs/finetune/adazeta_paper.yaml" in r)
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
    assert f"{command}\nwandazeta fit -c configs/finetune/encoder.yaml\n" in RECIPES


def test_no_page_says_of_a_benchmark_with_results_that_it_has_not_been_run(render):
    assert (render.RESULTS / "finetune.json").exists()
    for page in PAGES:
        assert "not been run yet" not in page.read_text().replace("the others have not been run yet", ""), page
