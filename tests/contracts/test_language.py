"""Documentation, docstrings, comments and messages use the terms of the field.

One word per thing, as scikit-learn and torchvision have it; the glossary of the
development page has the list. Each failure names file, line, the word that was found,
and what to write instead.
"""

import ast
import io
import re
import tokenize
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# What was found, and what to write. A space stands for any white space, so that a
# phrase is found across lines.
BANNED = {
    # The data
    r"pictures?": "image",
    r"records? of (your|one's|the user's) own": "a `Backbone` of your own",
    r"recipes?": "config, configuration, procedure",
    r"variants?": "augmented view",
    r"likeness(es)?": "domain similarity",
    r"near(er|est)? to what": "similar to (domain similarity)",
    r"what (it|the network|a network|the backbone) knows": "the pretraining data",
    # The network
    r"(the|its|all|all of its|random) numbers (of|in) (a|the|its|this|each) (network|"
    r"backbone|block|layer|head|module)s?": "weights, parameters",
    r"new layers?": "head",
    r"put(s|ting)? on (a|the|its) (frozen )?(network|backbone|blocks?)": "attach",
    r"cuts? (behind|after)": "truncated at, layer",
    r"(an?|the|last|earl(y|ier|iest)|late|later|each|every|which|that|this|best|other|"
    r"several|main|deepest|finer|two|three) cuts?(?! points?)": "layer",
    r"places? (after|behind) (an?|the|its|each) (block|layer|module)s?": "layer",
    r"as it is": "pretrained classifier, without training, unchanged",
    # Training
    r"rates?": "learning rate",
    r"asleep|awake|(put|puts|putting) to sleep|wakes?|woken": "eval mode, train mode",
    r"(tell|tells|told|telling)( \w+){0,4} apart": "classify, distinguish, separate",
    r"(look|looks|looked|looking) at": "use, evaluate on, examine",
    r"(network|backbone|classifier|model|layer|head)s? (sees|saw|ha(s|ve) (ever )?seen|"
    r"looks?)|(networks|layers) see": "be given, be trained on, use",
    r"learn(s|ed|t)? by heart": "overfit",
    # Running
    r"under way": "in flight",
    r"bursts?": "chunk",
    r"sift(s|ed|ing)?": "filter",
    r"shelf|shelves": "table, store",
    r"claim(s|ed|ing)?": "lease",
    r"(decod|read|load|comput)\w* ahead|ahead of the network": "prefetch",
    r"looks? into": "lookup",
    r"in turns|tak(e|es|ing) turns": "alternate",
    r"how (fast|much)": "throughput, latency, memory, cost",
    # Idiom
    r"roads?|stations?|inhabitants?|front doors?": "data flow, subpackage, interface",
    r"shall": "must, should, will",
    r"lies": "is, is stored",
    r"so many": "number of",
    r"moods?": "noise",
}

# Verbs of which British English also writes "-ise".
VERBS = (
    "author|character|general|initial|maxim|memor|minim|normal|optim|organ|quant|"
    "recogn|regular|serial|standard|summar|synchron|visual"
)
BRITISH = {
    r"\w*colour\w*": "color",
    r"grey\w*": "gray",
    r"centre\w*": "center",
    r"\w*neighbour\w*": "neighbor",
    r"\w*behaviour\w*": "behavior",
    r"licences?": "license",
    r"\w*labell(ed|ing)": "labeled, labeling",
    rf"\w*({VERBS})is(e|es|ed|er|ing|ation|ations)": "-ize, -ization",
}

# What contains a banned word and is right, and why.
ALLOWED = {
    r"(learning|dropout|error|frame|bit|sampling)[- ]rates?": "terms of the field",
    r"instead of ``rates=``": "the former name of a parameter",
    r"leases\|claims": "the name of a file of 0.1.0",
    r"off-the-shelf": "the title of a paper",
}

# First words of docstrings, and of the descriptions of parameters and attributes, that
# are neither noun phrases nor imperatives.
FRAGMENTS = {"Of", "Its", "Which", "Where", "What", "Who", "Whose", "Likewise", "How"}
DESCRIPTION = re.compile(r"^[\w`*, ]+ : .*\n\s+(.*)$", re.MULTILINE)


def is_ours(path):
    """Leave out what sphinx and sphinx-gallery have generated."""
    parts = path.relative_to(ROOT).parts
    return parts[:2] not in {("docs", "api"), ("docs", "auto_examples")} and (
        "_build" not in parts
    )


PACKAGE = sorted((ROOT / "skltl").rglob("*.py"))
CODE = [*PACKAGE, *sorted((ROOT / "examples").rglob("*.py"))]
PAGES = [
    ROOT / "README.md",
    *filter(is_ours, sorted((ROOT / "docs").rglob("*.rst"))),
    *sorted((ROOT / "examples").rglob("*.rst")),
]


def name_of(path):
    return str(path.relative_to(ROOT))


def blanked(text):
    """Replace a text by white space that has the same lines."""
    return re.sub(r"\S", " ", text)


@cache
def prose_of(path):
    """Return a file's text with all code replaced by blanks, line by line."""
    text = path.read_text()
    return text if path.suffix != ".py" else prose_of_code(text)


def prose_of_code(source):
    """Keep the comments and strings of Python code, each at its line and column."""
    lines = [blanked(line) for line in source.splitlines(keepends=True)]
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        row, column = token.start
        text = prose_of_token(token)
        for number, part in enumerate(text.split("\n") if text else []):
            line, start = lines[row - 1 + number], column if number == 0 else 0
            lines[row - 1 + number] = line[:start] + part + line[start + len(part) :]
    return "".join(lines)


def prose_of_token(token):
    """Return a comment, or a string without its quotes and f-string fields."""
    text = token.string
    if token.type == tokenize.COMMENT:
        return text.replace("#", " ", 1)
    if token.type == getattr(tokenize, "FSTRING_MIDDLE", None):  # from Python 3.12 on
        return text
    if token.type != tokenize.STRING:
        return ""
    is_formatted = "f" in re.match(r"\w*", text)[0].lower()
    text = re.sub(r"^\w*['\"]+|['\"]+$", lambda quotes: blanked(quotes[0]), text)
    if is_formatted:
        text = re.sub(r"\{[^{}]*\}", lambda field: blanked(field[0]), text)
    # A single word is a key or the name of an option.
    return blanked(text) if re.fullmatch(r"\s*\w+\s*", text) else text


def found_in(prose, words):
    """Yield line, text and suggestion for each banned word of a text."""
    for pattern in ALLOWED:
        prose = compiled(pattern).sub(lambda match: blanked(match[0]), prose)
    for pattern, better in words.items():
        for match in compiled(pattern).finditer(prose):
            line = prose.count("\n", 0, match.start()) + 1
            yield line, " ".join(match[0].split()), better


@cache
def compiled(pattern):
    """Match whole words, in any case, across lines."""
    spaced = pattern.replace(" ?", "\0").replace(" ", r"\s+").replace("\0", " ?")
    return re.compile(rf"(?<!\w)(?:{spaced})(?!\w)", re.IGNORECASE)


def assert_nothing(found, path):
    """Fail with one line for each word that was found in a file."""
    lines = [
        f"{name_of(path)}:{line}: {word!r} -> {better}"
        for line, word, better in sorted(found)
    ]
    if lines:
        pytest.fail("\n".join(lines), pytrace=False)


@pytest.mark.parametrize("path", [*PAGES, *CODE], ids=name_of)
def test_prose_uses_the_terms_of_the_field(path):
    assert_nothing(found_in(prose_of(path), BANNED), path)


@pytest.mark.parametrize("path", [*PAGES, *CODE], ids=name_of)
def test_prose_is_american_english(path):
    assert_nothing(found_in(prose_of(path), BRITISH), path)


@pytest.mark.parametrize("path", PACKAGE, ids=name_of)
def test_descriptions_begin_with_a_noun_phrase_or_an_imperative(path):
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            text = ast.get_docstring(node) or ""
            for beginning in (text, *DESCRIPTION.findall(text)):
                words = beginning.split()[:5]
                if words and words[0].strip(",.:") in FRAGMENTS:
                    line = getattr(node, "lineno", 1)
                    found.append((line, " ".join(words), "a noun phrase, or a verb"))

    assert_nothing(found, path)


@pytest.mark.parametrize(
    "code",
    [
        '"""Choose\n    a picture."""',
        "x = 1  # a picture",
        'raise ValueError(f"The {name!r} of a " f"picture is wrong.")',
    ],
    ids=["docstring", "comment", "message"],
)
def test_words_are_found_in_all_kinds_of_prose(code):
    (found,) = found_in(prose_of_code(code), BANNED)

    assert found[1:] == ("picture", "image")


@pytest.mark.parametrize(
    "code",
    ["picture = 1", 'f"{picture.name}"', 'rows["picture"]'],
    ids=["name", "field of an f-string", "key"],
)
def test_names_in_code_are_not_prose(code):
    assert not list(found_in(prose_of_code(code), BANNED))


def test_phrases_are_found_across_lines_and_strings():
    code = 'text = (\n    "It tells the classes "\n    "apart."\n)'

    (found,) = found_in(prose_of_code(code), BANNED)

    assert found == (2, "tells the classes apart", "classify, distinguish, separate")


def test_the_files_are_found():
    assert len(PAGES) >= 12
    assert len(CODE) >= 40
