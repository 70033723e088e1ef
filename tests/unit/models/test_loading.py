import re

import pytest

from wandazeta.models.loading import load_backbone, load_tokenizer


def refusal(model_name_or_path):
    """What both say of a model that is not there."""
    with pytest.raises(ValueError, match=f"but got {re.escape(repr(model_name_or_path))}: ") as tokenizer:
        load_tokenizer(model_name_or_path, trust_remote_code=False, pad_token=None)
    with pytest.raises(ValueError, match=f"but got {re.escape(repr(model_name_or_path))}: ") as model:
        load_backbone(model_name_or_path, "float32", None, trust_remote_code=False)
    reasons = [str(error.value).split(f"{model_name_or_path!r}: ")[1] for error in (tokenizer, model)]
    assert reasons[0] == reasons[1]
    return reasons[0]


@pytest.fixture(autouse=True)
def own_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WANDAZETA_CACHE", raising=False)


@pytest.mark.parametrize("name", ["runs/pruned", "./model", "../model", "/nowhere/model", "some/where/model"])
def test_a_directory_that_is_not_there_is_no_name_of_the_hub(name):
    assert refusal(name) == "there is no such directory; write it first, or name another"


def test_a_name_of_the_hub_has_the_hubs_answer():
    assert "no such directory" not in refusal("owner/model")


def test_a_directory_that_is_there_has_its_own_reason(tmp_path):
    (tmp_path / "runs/pruned").mkdir(parents=True)
    with pytest.raises(ValueError, match="but got 'runs/pruned': ") as error:
        load_backbone("runs/pruned", "float32", None, trust_remote_code=False)
    assert "no such directory" not in str(error.value)


def test_a_sample_that_is_not_there_comes_with_its_command(tmp_path, monkeypatch):
    command = "python -m wandazeta.data.samples minilm-l6"
    fetching = "there is no such directory; run `{}` to fetch this sample"
    # nobody has made the folder that the configs name: without it samples go to the home directory
    name = ".cache/wandazeta/minilm-l6"
    assert refusal(name) == fetching.format(f"WANDAZETA_CACHE=.cache/wandazeta {command}")
    (tmp_path / ".cache/wandazeta").mkdir(parents=True)
    assert refusal(name) == fetching.format(command)
    monkeypatch.setenv("WANDAZETA_CACHE", str(tmp_path / "samples"))
    assert refusal(name) == fetching.format(f"WANDAZETA_CACHE=.cache/wandazeta {command}")
    assert refusal(str(tmp_path / "samples/minilm-l6")) == fetching.format(command)
