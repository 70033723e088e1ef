"""Completes pyproject.toml: in the package's description, the links of README.md lead to the repository."""

import re
import tomllib
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
HOME = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"]["Homepage"]


def absolute(link: re.Match[str]) -> str:
    """Return the start of a link or picture with the address of its file."""
    return f"{link[0]}{HOME}/{'raw' if link[1] else 'blob'}/main/"


setup(
    long_description=re.sub(
        r"(!?)\[[^]]*\]\((?!https?://|#)", absolute, (ROOT / "README.md").read_text(encoding="utf-8")
    ),
    long_description_content_type="text/markdown",
)
