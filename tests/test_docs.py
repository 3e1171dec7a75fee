"""The documentation holds what it says: every block of code runs, every link leads somewhere, the site builds.

May live here: tests over whole pages. May not: how blocks are run (``documents``).
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import documents
import pytest
from documents import ROOT, Block

import rt

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_block_of_code_runs(page: Path, tmp_path: Path) -> None:
    documents.run(page.read_text(encoding="utf-8"), page.name, tmp_path)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_block_says_what_it_is(page: Path) -> None:
    unknown = [block for block in documents.blocks(page.read_text(encoding="utf-8")) if block.language not in documents.LANGUAGES]
    assert not unknown


def test_the_site_builds_without_a_warning_and_every_link_leads_somewhere(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    env = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}  # about what comes after it: not ours to act on in a build
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "api.html").exists()


def test_the_api_page_has_every_name() -> None:
    shown = set(re.findall(r"^::: rt(?:\.sync)?\.(\w+)$", (ROOT / "docs" / "api.md").read_text(encoding="utf-8"), re.M))
    assert shown - {"errors"} == {name for name in rt.__all__ if not name.endswith("Error")}


def test_every_test_that_the_documentation_names_is_there() -> None:
    files = list((ROOT / "tests").glob("*.py"))
    there = {name for file in files for name in re.findall(r"^(?:async )?def (test_\w+)", file.read_text(encoding="utf-8"), re.M)}
    there |= {file.name for file in files} | {file.stem for file in files}
    for page in PAGES:
        named = set(re.findall(r"\b(test_\w+(?:\.py)?)(?![\w*])", page.read_text(encoding="utf-8")))
        assert named <= there, page.name


def test_every_line_of_mlx_that_has_a_test_names_it_and_the_others_say_why_not() -> None:
    _, *tables = (ROOT / "docs" / "mlx.md").read_text(encoding="utf-8").split("| test |\n|---|---|---|\n")
    rows = [line for table in tables for line in table.split("\n\n")[0].splitlines()]
    assert len(rows) > 100
    for row in rows:
        _, _, here, tests, _ = row.split("|")
        assert tests == " - " if here.startswith(" not offered: ") else re.fullmatch(r" `test_\w+`(, `test_\w+`)* ", tests), row


# --- the rules themselves ---------------------------------------------------------------------------------------------------------------


def test_blocks_of_a_page() -> None:
    page = "# T\n\n<!-- setup\nx = 1\n-->\n```python\ny = await z\n```\n\n<!-- not run: two hosts -->\n```console\n$ ls\n```\n"
    assert documents.blocks(page) == [
        Block("python", "x = 1\n", 3, ""), Block("python", "y = await z\n", 6, ""), Block("console", "$ ls\n", 11, "two hosts"),
    ]  # fmt: skip
    assert documents.blocks("```python\n# hello.py\n```\n")[0].file == "hello.py"


@pytest.mark.parametrize(
    "page",
    [
        "```python\nassert False\n```\n",
        "```python\nimport rt\nassert (await rt.init()).size() == 3\n```\n",
        "```console\n$ echo yes\nno\n```\n",
        "```console\n$ echo yes\nno\n...\n```\n",
        "```console\n$ echo yes\n```\n",
    ],
)
def test_a_page_that_is_wrong_is_found_out(page: str, tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        documents.run(page, "page.md", tmp_path)


@pytest.mark.parametrize("page", ["```json\n{]\n```\n", "<!-- not run: no reason -->\n```python\nx = = 1\n```\n"])
def test_what_is_not_run_must_parse(page: str, tmp_path: Path) -> None:
    with pytest.raises((SyntaxError, ValueError)):
        documents.run(page, "page.md", tmp_path)


def test_a_page_that_is_right_passes(tmp_path: Path) -> None:
    page = (
        "<!-- ranks: 3 -->\n<!-- setup\nimport rt\n-->\n```python\nassert (await rt.init()).size() == 3\nx = 1\n```\n"
        "```python\nassert x\n```\n"
        "```python\n# a.py\nprint('ran')\n```\n```console\n$ python a.py\nran\n$ echo a; echo b; echo c\nc\n...\n```\n"
    )
    documents.run(page, "page.md", tmp_path)


def test_programs_print_whole_lines_however_the_tests_are_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONUNBUFFERED", "1")
    page = '```console\n$ python -c "import sys; print(sys.stdout.write_through)"\nFalse\n```\n'
    documents.run(page, "page.md", tmp_path)
