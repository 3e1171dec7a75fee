"""Code blocks of the documentation: how a page is read, and how its blocks become programs that run.

May live here: the rules below. May not: tests (``test_docs``), anything that knows a page.

The rules a page's writer follows:

* ```` ```python ```` blocks of a page are one program, run in order by two ranks; ``await`` may stand at the top. What readers need not
  see stands in a comment before: ``<!-- setup`` , code, ``-->``. ``<!-- ranks: 4 -->`` asks for another number of ranks.
* A python block whose first line is ``# name.py`` is a file of that name instead.
* ```` ```console ```` blocks are commands after ``$``, run in the folder of the page's files, and what they print: line by line in any
  order, since ranks print when they like; ``...`` stands for anything.
* ```` ```json ```` and ```` ```toml ```` blocks must parse. ```` ```text ```` and ```` ```sh ```` are shown only.
* ``<!-- not run: why -->`` above a block of the first kinds says why it is only compiled.
"""

from __future__ import annotations

import fnmatch
import json
import os
import re
import subprocess
import sys
import textwrap
import tomllib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LANGUAGES = ("python", "console", "json", "toml", "text", "sh")
PATIENCE = 120.0

_PIECE = re.compile(
    r"^<!-- setup\n(?P<setup>.*?)^-->$|(?:^<!-- not run: (?P<why>[^\n]+) -->\n+)?^ *```(?P<language>\w*)[^\n]*\n(?P<code>.*?)^ *```$",
    re.M | re.S,
)
_RANKS = re.compile(r"^<!-- ranks: (\d+) -->$", re.M)
_FILE = re.compile(r"# (\w+\.py)\n")
# Runs the blocks in one namespace; each keeps its place in the page, so that a traceback shows the line in question.
_RUNNER = """\
import ast, asyncio, inspect, json, sys

async def main():
    names = {"__name__": "page"}
    for line, code in json.load(open(sys.argv[1])):
        program = compile("\\n" * line + code, sys.argv[2], "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
        value = eval(program, names)
        if inspect.iscoroutine(value):
            await value

asyncio.run(main())
"""


@dataclass(frozen=True)
class Block:
    """A block of code: its language, its text, the number of the line before it, and why it is not run (or nothing)."""

    language: str
    code: str
    line: int
    why_not: str

    @property
    def file(self) -> str | None:
        """The name of the file that it shows."""
        match = _FILE.match(self.code) if self.language == "python" else None
        return match[1] if match else None


def blocks(page: str) -> list[Block]:
    """Return the blocks of a page, set-up comments among them as python."""
    found = []
    for match in _PIECE.finditer(page):
        if match["setup"] is not None:
            found.append(Block("python", match["setup"], page.count("\n", 0, match.start("setup")), ""))
        else:
            code = textwrap.dedent(match["code"])
            found.append(Block(match["language"], code, page.count("\n", 0, match.start("code")), match["why"] or ""))
    return found


def ranks(page: str) -> int:
    """Return how many ranks run the page's program."""
    match = _RANKS.search(page)
    return int(match[1]) if match else 2


def check_unrun(block: Block, name: str) -> None:
    """Compile or parse what is not run."""
    if block.language == "python":
        compile(block.code, f"{name}:{block.line}", "exec", 1 << 13)  # top-level await
    elif block.language == "json":
        json.loads(block.code)
    elif block.language == "toml":
        tomllib.loads(block.code)


def run(page: str, name: str, folder: Path) -> None:
    """Run everything on a page that runs.

    Raises:
        AssertionError: a program failed, or printed something else than the page shows.
    """
    program = []
    for block in blocks(page):
        check_unrun(block, name)
        if block.why_not:
            continue
        if block.file is not None:
            (folder / block.file).write_text(block.code, encoding="utf-8")
        elif block.language == "python":
            program.append((block.line, block.code))
        elif block.language == "console":
            _console(block, name, folder)
    if program:
        (folder / "blocks.json").write_text(json.dumps(program), encoding="utf-8")
        (folder / "page.py").write_text(_RUNNER, encoding="utf-8")
        command = [sys.executable, "-m", "rt.launch", "-n", str(ranks(page)), "page.py", "blocks.json", name]
        done = subprocess.run(command, cwd=folder, env=_environment(), capture_output=True, text=True, timeout=PATIENCE, check=False)
        assert done.returncode == 0, f"{name}:\n{done.stdout}\n{done.stderr}"


def _environment() -> dict[str, str]:
    """A reader's: without buffers ``print`` writes the end of a line apart, and the lines of programs that share a pipe mix."""
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return {**inherited, "PATH": path, "PYTHONPATH": str(ROOT)}


def _console(block: Block, name: str, folder: Path) -> None:
    for session in re.split(r"^\$ ", block.code, flags=re.M)[1:]:
        command, _, shown = session.partition("\n")
        done = subprocess.run(
            ["bash", "-c", command], cwd=folder, env=_environment(), capture_output=True, text=True, timeout=PATIENCE, check=False
        )
        where = f"{name}:{block.line}: $ {command}\n{done.stdout}{done.stderr}"
        expected, printed = shown.splitlines(), (done.stdout + done.stderr).splitlines()
        if "..." in expected:
            missing = [line for line in expected if line != "..." and not fnmatch.filter(printed, _pattern(line))]
            assert not missing, f"{where}\nnot printed: {missing}"
        else:
            assert Counter(expected) == Counter(printed), where


def _pattern(line: str) -> str:
    """Only ``...`` stands for something else."""
    return line.replace("[", "[[]").replace("*", "[*]").replace("?", "[?]").replace("...", "*")
