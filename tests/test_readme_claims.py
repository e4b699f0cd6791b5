"""What README, docs and the repository's pages say, as far as the code can tell."""

import ast
import re
from dataclasses import fields
from pathlib import Path

import pytest

from vllm_ffa_fp8fp8.config import FFAConfig
from vllm_ffa_fp8fp8.option_docs import described_options, options_table

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = (*(ROOT / f"{name}.md" for name in ("CHANGELOG", "CONTRIBUTING", "SECURITY")), *DOCS)
LINK = re.compile(r"\]\(([^)#\s]*)(#[^)\s]*)?\)")


def test_readme_stands_alone():
    """As an installed package's description it has no files beside it, and does without its one
    picture."""
    links = [target for target, _ in LINK.findall(README)]
    pictures = [target for target in links if target.startswith("docs/") and target[-4:] == ".png"]
    assert len(pictures) == README.count("![") == 1 and (ROOT / pictures[0]).is_file()
    assert all(target.startswith("https://") for target in set(links) - set(pictures))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_of_pages_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    for target, _ in LINK.findall(text):
        assert target.startswith("https://") or (page.parent / target).exists(), target


def test_files_that_pages_name_are_there():
    for page in (ROOT / "README.md", *PAGES):
        for name in re.findall(r"`([\w./-]+/[\w.-]+\.(?:py|md|yaml|sh))`", page.read_text("utf-8")):
            assert (ROOT / name).exists() or (page.parent / name).exists(), f"{page.name}: {name}"


def test_names_stand_in_the_files_that_the_architecture_says():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    named = re.findall(r"`(\w+)`\s+\(`([\w/]+\.py)`\)", text)
    assert len(named) > 40
    for name, file in named:
        source = (ROOT / file).read_text(encoding="utf-8")
        defined = rf"^\s*(?:def|class) {name}\b|^{name} = "
        assert re.search(defined, source, re.MULTILINE), f"{file} has no {name}"


def test_the_index_names_every_page():
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    targets = {target for target, _ in LINK.findall(index)}
    assert {page.name for page in DOCS} - {"README.md"} <= targets


def test_the_table_of_options_is_what_the_options_say():
    assert [option.name for option in described_options()] == [f.name for f in fields(FFAConfig)]
    assert options_table() in README


def test_security_names_every_patch():
    text = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    cells = re.findall(r"^\| (`[^|]+`) \|", text, re.MULTILINE)
    named = {name for cell in cells for name in re.findall(r"`(\w+)`", cell)}
    for file in (ROOT / "vllm_ffa_fp8fp8" / "integration").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and "Symptom " in (ast.get_docstring(node) or ""):
                assert node.name in named, f"{node.name} of {file.name}"


def test_one_word_for_what_is_kept():
    for page in (ROOT / "README.md", *DOCS):
        assert "skip ratio" not in page.read_text(encoding="utf-8").lower(), page.name
