"""The written documents: relative links and anchors resolve, cited sections and messages exist, README stays short.

`make docs` checks the pages below docs/; these are the checks that need no documentation tool, and the files outside docs/."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
METHOD = ROOT / "docs" / "explanation" / "method.md"
# `method.md, section 2.3`, also with several: `sections 2.2 and 2.3`, `sections 2 to 4`, or a defect: `method.md, C15`
CITATION = re.compile(
    r"docs/explanation/method\.md,\s+(?:sections?\s+([\d.]*\d(?:(?:,| and| to)\s+[\d.]*\d)*)|([CTS]\d+))"
)


def documents() -> list[Path]:
    return sorted([*ROOT.glob("*.md"), *(ROOT / "benchmarks").glob("*.md")])


def python_files() -> list[Path]:
    folders = [ROOT / name for name in ("ccella_fast", "kernels", "benchmarks", "tests", "examples", "docs")]
    return sorted(path for folder in folders for path in folder.rglob("*.py") if path != Path(__file__))


def broken_links(document: Path, text: str) -> list[str]:
    """Relative links of a Markdown text that lead nowhere."""
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", text, flags=re.DOTALL)):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = document.parent / name if name else document
        if not file.exists() or (anchor and anchor not in anchors(file.read_text())):
            broken.append(target)
    return broken


def anchors(text: str) -> set[str]:
    """GitHub's anchors of the headings."""
    headings = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def cited_sections(text: str) -> set[str]:
    """Numbers of sections and defects that a source file cites, wherever its comments break lines."""
    joined = re.sub(r"\n\s*#?\s*", " ", text)
    return {
        number
        for sections, defect in CITATION.findall(joined)
        for number in (re.findall(r"[\d.]*\d", sections) or [defect])
    }


def known_sections(text: str) -> set[str]:
    numbers = set(re.findall(r"^#+ ([\d.]*\d)\.? ", text, flags=re.MULTILINE))
    rows = re.findall(r"^\| ([CTS]\d[^|]*) \|", text, flags=re.MULTILINE)
    return numbers | {number for row in rows for number in row.split(", ")}


@pytest.mark.parametrize("document", documents(), ids=lambda path: str(path.relative_to(ROOT)))
def test_relative_links_lead_somewhere(document: Path) -> None:
    assert broken_links(document, document.read_text()) == []


def test_a_broken_link_is_found() -> None:
    text = "[a](docs/none.md) [b](#nowhere) [c](README.md) [d](https://example.org/none) [e](#here)\n## Here\n"
    assert broken_links(ROOT / "README.md", text) == ["docs/none.md", "#nowhere", "#here"]
    assert broken_links(METHOD, "[a](data.md#augmentation) [b](#25-autoencoder)") == []


def test_cited_sections_exist() -> None:
    known = known_sections(METHOD.read_text())
    cited = {path: cited_sections(path.read_text()) for path in python_files()}
    wrong = {str(path.relative_to(ROOT)): sorted(numbers - known) for path, numbers in cited.items() if numbers - known}
    assert not wrong
    assert len(set().union(*cited.values())) >= 15, "the citations have another form now"


def test_a_wrong_citation_is_found() -> None:
    text = "# {0},\n# sections 2.2 and 2.9; {0}, C15; {0}, C99".format("docs/explanation/method.md")
    assert cited_sections(text) == {"2.2", "2.9", "C15", "C99"}
    assert cited_sections(text) - known_sections(METHOD.read_text()) == {"2.9", "C99"}


@cache
def printed_texts() -> list[list[str]]:
    """The strings of the package and of the Makefile. Each as the texts before, between and after what an f-string inserts."""
    found = [[(ROOT / "Makefile").read_text()]]
    for path in python_files():
        if path.is_relative_to(ROOT / "ccella_fast") or path.is_relative_to(ROOT / "kernels"):
            nodes = list(ast.walk(ast.parse(path.read_text())))
            docstrings = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
            for node in nodes:
                if isinstance(node, ast.JoinedStr):
                    texts = [part.value if isinstance(part, ast.Constant) else "\0" for part in node.values]
                    found.append(re.split("\0+", "".join(map(str, texts))))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
                    found.append([node.value])
    return found


def is_printed(message: str, texts: list[list[str]]) -> bool:
    """Whether a message is one of the texts, or begins like one if it leaves something out, written as `...`."""
    pieces = [piece for piece in re.split(r"'?\[?\.\.\.]?'?", message) if piece.strip(" ,:;")]
    return any(
        all(any(piece.strip("' ") in text for text in parts) for piece in pieces)
        or (len("".join(parts)) > 10 and re.fullmatch(".+?".join(map(re.escape, parts)), message) is not None)
        for parts in texts
    )


def test_messages_of_the_page_on_troubleshooting_are_printed() -> None:
    page = (ROOT / "docs" / "how-to" / "troubleshooting.md").read_text()
    messages = re.findall(r"^\| `(.*?)`", page.partition("| message of `deepspeed` |")[0], flags=re.MULTILINE)
    texts = printed_texts()
    assert len(messages) > 15
    assert [message for message in messages if not is_printed(message, texts)] == []


def test_a_message_that_nothing_prints_is_found() -> None:
    texts = printed_texts()
    for message in (
        "a worker process was killed",
        "the port ... of the launcher is taken",
        "this series is coronal, not oblique",
    ):
        assert not is_printed(message, texts)


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120
