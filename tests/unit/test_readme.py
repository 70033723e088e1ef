import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from helpers.tokenizer import byte_tokenizer

from wandazeta.cli.main import main
from wandazeta.models.loading import load_tokenizer

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


@pytest.fixture
def render(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import render

    return render


def test_the_code_prints_what_is_shown(tmp_path):
    code, output = re.search(r"```python\n(.*?)```\n\n```\n(.*?)```", README, flags=re.DOTALL).groups()
    environment = os.environ | {"PYTHONPATH": str(ROOT / "examples")}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith(output)


def test_the_tables_are_those_of_the_result_files(render):
    texts = {page: (ROOT / page).read_text() for page in render.PAGES}
    for page, text in texts.items():
        assert render.rendered(text) == text, page
    markers = [name for text in texts.values() for name in re.findall(r"<!-- (\w+): written by", text)]
    # a table appears with its first records
    assert sorted(markers) == sorted(
        name for name, (result, _) in render.BLOCKS.items() if (render.RESULTS / f"{result}.json").exists()
    )


def test_links_lead_to_files():
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if not link.startswith("https://")]
    assert links
    for link in links:
        assert (ROOT / link).exists(), link


def test_commands_name_files_that_exist():
    for name in re.findall(r"configs/[\w/]+\.yaml", README):
        assert (ROOT / name).exists(), name


def recipes(command):
    """The arguments of every recipe of a command, with what is continued on the next line."""
    block = next(b for b in re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL) if "# prune any model" in b)
    lines = block.replace("\\\n", " ").splitlines()
    return [shlex.split(line)[1:] for line in lines if line.startswith(f"wandazeta {command} ")]


@pytest.fixture
def parsed(monkeypatch, capsys):
    """Return what a recipe comes to."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("sys.argv", ["wandazeta"])

    def parse(arguments):
        with pytest.raises(SystemExit, match="0"):
            main([*arguments, "--print_config"])
        return yaml.safe_load(capsys.readouterr().out)

    return parse


def test_recipes_that_prune_do_not_share_their_progress(parsed):
    runs = [parsed(recipe) for recipe in recipes("prune")]
    folders = [run["trainer"]["callbacks"][-1]["init_args"]["output_dir"] for run in runs]
    assert len(set(folders)) == len(folders) >= 3


def test_the_recipe_with_the_papers_settings_takes_a_model_without_llamas_token(parsed, tmp_path):
    (recipe,) = (r for r in recipes("fit") if "configs/finetune/adazeta_paper.yaml" in r)
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
    assert f"{command}\nwandazeta fit -c configs/finetune/encoder.yaml\n" in README


def test_no_page_says_of_a_benchmark_with_results_that_it_has_not_been_run(render):
    assert (render.RESULTS / "finetune.json").exists()
    assert "not been run yet" not in (ROOT / "docs/objectives.md").read_text()
