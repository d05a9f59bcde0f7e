"""The code of the guide, for the tests that run parts of it."""

import contextlib
import doctest
import re
import textwrap
from pathlib import Path

GUIDE = Path(__file__).parents[1] / "docs" / "guide"
FIRST_PAGE = GUIDE / "folder_to_model.rst"

BLOCK = re.compile(r"^\.\. code-block:: python\n((?:\n|   .*\n)+)", re.MULTILINE)
TITLE = re.compile(r"^(.+)\n(?:=+|-+)$", re.MULTILINE)


def create_photographs(folder):
    """Create the images of the first page, which other pages use, in a folder."""
    creation = [one for one in sources_of(FIRST_PAGE.read_text()) if "skltl" not in one]
    last = next(n for n, source in enumerate(creation) if "image.save" in source)
    with contextlib.chdir(folder):
        run(creation[: last + 1], {})
    return folder / "photographs"


def run(sources, names):
    """Execute pieces of code one after the other, with the same names."""
    for source in sources:
        exec(source, names)
    return names


def sources_of(text):
    """Return the code of the examples, whose lines begin with a prompt."""
    return [one.source for one in doctest.DocTestParser().get_examples(text)]


def blocks_of(text):
    """Return the code blocks, which have no prompts."""
    return [textwrap.dedent(block) for block in BLOCK.findall(text)]


def sections_of(page):
    """Return the text of each section of a page, by its title."""
    _, *parts = TITLE.split(page.read_text())
    return dict(zip(parts[::2], parts[1::2], strict=True))
