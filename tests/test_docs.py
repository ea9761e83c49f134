# SPDX-License-Identifier: Apache-2.0
"""The documents run: every Python block and every command of README and docs, with settings that take seconds.

The Python blocks of a page share one namespace, in order; a `text` block directly after one is what it prints. A command of
`paradiff` runs in this process. Of other commands what they name is looked up: the targets of make, the extras of pip, the
files of python. `<!-- not run: REASON -->` directly above a block leaves it out, and the test is skipped with that reason.
"""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import itertools
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
from pipelines import Cli

import paradiff

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept:DeprecationWarning")

ROOT = Path(__file__).parents[1]
SOURCE = Path(paradiff.__file__).parent
ROOMS = ["chain", "samplers", "solver", "methods", "models", "planning", "pipelines", "serving"]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted(p for p in (ROOT / "docs").rglob("*.md") if "api" not in p.parts),
]
BLOCK = re.compile(
    r"(?:<!-- not run: (?P<reason>.+?) -->\n)?^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL
)
LANGUAGES = ("python", "sh", "text", "json")
INLINE = re.compile(r"`((?:paradiff (?:sample|generate|explain|methods)|make|pip install|python) [^`]+)`")
PATH = re.compile(r"\b[\w-]+(?:/[\w.-]+)+\.(?:py|md|json|png|toml)\b")
LINK = re.compile(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]+))?\)")


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        language: The word after the fence.
        text: The lines within.
        begin: The page's line of the first of them, counted from 1.
        reason: Why it is not run; None if it is.
        printed: What it prints, by the page; None where that is not said.
    """

    language: str
    text: str
    begin: int
    reason: str | None
    printed: str | None = None


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page, in order."""
    source = page.read_text(encoding="utf-8")
    found: list[Block] = []
    end = 0
    for match in BLOCK.finditer(source):
        begin = source.count("\n", 0, match.start("text")) + 1
        block = Block(match["language"], match["text"], begin, match["reason"])
        if block.language == "text" and found and found[-1].language == "python" and not source[end : match.start()].strip():
            last = found.pop()
            block = Block("python", last.text, last.begin, last.reason, match["text"])
        found.append(block)
        end = match.end()
    return found


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return BLOCK.sub("", page.read_text(encoding="utf-8"))


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def commands() -> list[object]:
    """Every command of the pages, once, as a test's parameters; in prose, words in capitals stand for something."""
    found: dict[str, object] = {}
    for page in PAGES:
        given = [(b.text, b.reason) for b in blocks(page) if b.language == "sh"]
        given += [(m[1], None) for m in INLINE.finditer(prose(page)) if not re.search(r"\b[A-Z]{3,}\b", m[1])]
        for text, reason in given:
            for line in text.replace("\\\n", " ").splitlines():
                command = " ".join(line.split("#")[0].split())
                if command and command not in found:
                    marks = [pytest.mark.skip(reason=reason)] if reason else []
                    found[command] = pytest.param(command, id=f"{name(page)}: {command}", marks=marks)
    return list(found.values())


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_the_python_blocks_of_a_page_run_in_order(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "__main__"}
    left_out: list[str] = []
    for block in blocks(page):
        if block.language != "python":
            continue
        if block.reason:
            left_out.append(f"line {block.begin}: {block.reason}")
            continue
        code = compile("\n" * (block.begin - 1) + block.text, str(page), "exec")  # errors then name the page's own lines
        capsys.readouterr()
        exec(code, namespace)
        if block.printed is not None:
            assert capsys.readouterr().out.strip() == block.printed.strip()
    if left_out:
        pytest.skip("; ".join(left_out))


@pytest.mark.parametrize("command", commands())
def test_a_command_of_the_pages_runs(command: str, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program, *arguments = shlex.split(command)
    match program.rpartition("/")[2]:
        case "paradiff":
            monkeypatch.chdir(tmp_path)
            result = cli(*arguments)
            assert result.code == 0, result.err
        case "make":
            targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
            assert set(arguments) <= targets
        case "pip":
            (package,) = arguments[1:]
            found = re.fullmatch(r"(?:paradiff|\.)(?:\[([\w,]+)\])?", package)
            assert found, package
            assert set((found[1] or "all").split(",")) <= extras()
        case "python":
            assert (ROOT / arguments[0]).is_file()
        case _:
            pytest.fail(f"a page gives {command!r}, which nothing here runs or looks up; mark it as not run, with a reason")


def test_make_alone_names_every_target() -> None:
    rules = (ROOT / "Makefile").read_text()
    (targets,) = re.findall(r"^\.PHONY: (.*)", rules, flags=re.MULTILINE)
    named = re.findall(r'^\t@echo "make (\S+)', rules, flags=re.MULTILINE)
    assert ["help", *named] == targets.split()
    assert re.findall(r"^([^\s#=]+):", rules, flags=re.MULTILINE)[1] == "help"  # after .PHONY: what `make` alone makes


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_code_is_fenced_and_names_its_language(page: Path) -> None:
    assert [b for b in blocks(page) if b.language not in LANGUAGES] == []
    assert re.findall(r"^ {4}(?:paradiff|pip|make|git|python|import|from) .*", prose(page), flags=re.MULTILINE) == []


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_to_files_and_headings(page: Path) -> None:
    for path, heading in LINK.findall(prose(page)):
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), path
        if heading:
            titles = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), flags=re.MULTILINE)
            assert heading in {re.sub(r"[^\w\- ]", "", t.lower()).replace(" ", "-") for t in titles}, heading


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_files_that_a_page_names_are_there(page: Path) -> None:
    places = (ROOT, SOURCE, page.parent)
    for path in PATH.findall(prose(page)):
        assert path.startswith("demo/") or any((place / path).exists() for place in places), path  # demo/ is made by make


def extras() -> set[str]:
    """The optional dependency groups of the package."""
    (groups,) = re.findall(r"^\[project\.optional-dependencies\]$(.*?)^\[", (ROOT / "pyproject.toml").read_text(), re.M | re.S)
    return set(re.findall(r"^(\w+) = \[$", groups, flags=re.MULTILINE))


def test_the_readme_explains_every_extra_but_those_of_development() -> None:
    assert set(re.findall(r"^\| `(\w+)` \|", prose(ROOT / "README.md"), flags=re.MULTILINE)) >= extras() - {"dev", "docs"}


def test_the_index_and_the_readme_lead_to_every_page() -> None:
    for start in (ROOT / "docs/index.md", ROOT / "README.md"):
        reached = {(start.parent / path).resolve() for path, _ in LINK.findall(prose(start))}
        pages = {p.resolve() for p in PAGES if p.parent != ROOT and p.name != "index.md"}
        assert pages <= reached, f"{start.name} names no {sorted(p.name for p in pages - reached)}"


# -- the API reference, which is made of docstrings --------------------------------------------------------------------


@functools.cache
def described() -> set[str]:
    """Names that are given a value in some file of the package, with a docstring below."""
    found: set[str] = set()
    for path in SOURCE.rglob("*.py"):
        body = ast.parse(path.read_text(encoding="utf-8")).body
        for node, after in itertools.pairwise(body):
            if isinstance(node, ast.Assign) and isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
                found |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return found


@pytest.mark.parametrize("room", ["paradiff", *(f"paradiff.{room}" for room in ROOMS)])
def test_every_public_name_has_a_docstring(room: str) -> None:
    module = importlib.import_module(room)
    constants = described()
    for public in module.__all__:
        value = getattr(module, public)
        if isinstance(value, ModuleType) or inspect.isfunction(value) or inspect.isclass(value):
            # A dataclass without one is given its signature.
            assert value.__doc__, public
            assert not value.__doc__.startswith(f"{public}("), public
        else:
            assert public in constants | {"__version__"}, public
        for member, method in vars(value).items() if inspect.isclass(value) else ():
            if inspect.isfunction(method) and not member.startswith("_"):
                assert method.__doc__, f"{public}.{member}"
