"""The house's rules for Python files that no linter knows: sizes, names, docstrings, where input is read.

A function counts from its `def` to its last line, decorators and docstring left out; a class from its `class` to its
last line.
"""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MAX_FILE, MAX_CLASS, MAX_FUNCTION = 400, 250, 50
SOURCES = ("services", "client", "scripts", "tests", "bench")
MAY_READ_THE_ENVIRONMENT = re.compile(r"services/kvbaton/cli/(__init__|serve|main|deployment)\.py|(tests|scripts)/.*")
ENVIRONMENT = {"environ", "environb", "getenv", "getenvb", "putenv"}

Function = ast.FunctionDef | ast.AsyncFunctionDef


def python_files() -> list[str]:
    """Every Python file that belongs to the project, generated ones left out."""
    folders = [ROOT / folder for folder in SOURCES if (ROOT / folder).is_dir()]
    return sorted(str(path.relative_to(ROOT)) for folder in folders for path in folder.rglob("*.py"))


FILES = python_files()
SHIPPED = [name for name in FILES if name.startswith(("services/", "client/"))]


def tree_of(name: str) -> ast.Module:
    return ast.parse((ROOT / name).read_text(encoding="utf-8"))


def lines_of(node: Function | ast.ClassDef) -> int:
    assert node.end_lineno is not None
    return node.end_lineno - node.lineno + 1


def docstring_lines(node: Function) -> int:
    first = node.body[0]
    if ast.get_docstring(node) is None or first.end_lineno is None:
        return 0
    return first.end_lineno - first.lineno + 1


def too_long(tree: ast.Module) -> list[str]:
    """Functions and classes over their limits."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, Function) and lines_of(node) - docstring_lines(node) > MAX_FUNCTION:
            found.append(f"{node.name} has {lines_of(node) - docstring_lines(node)} lines")
        if isinstance(node, ast.ClassDef) and lines_of(node) > MAX_CLASS:
            found.append(f"{node.name} has {lines_of(node)} lines")
    return found


def undocumented(tree: ast.Module) -> list[str]:
    """Public classes and functions, at any depth of public classes, that say nothing about themselves."""
    found: list[str] = []
    todo: list[tuple[str, ast.Module | ast.ClassDef]] = [("", tree)]
    while todo:
        prefix, parent = todo.pop()
        for node in parent.body:
            if not isinstance(node, Function | ast.ClassDef) or node.name.startswith("_"):
                continue
            overload = any(isinstance(d, ast.Name) and d.id == "overload" for d in node.decorator_list)
            if not ast.get_docstring(node) and not overload:
                found.append(f"{prefix}{node.name}")
            if isinstance(node, ast.ClassDef):
                todo.append((f"{prefix}{node.name}.", node))
    return found


def reads_environment(tree: ast.Module) -> bool:
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "os":
            if node.attr in ENVIRONMENT:
                return True
        elif isinstance(node, ast.ImportFrom) and node.module == "os" and {a.name for a in node.names} & ENVIRONMENT:
            return True
    return False


@pytest.mark.parametrize("name", FILES)
def test_sizes(name: str) -> None:
    num_lines = len((ROOT / name).read_text(encoding="utf-8").splitlines())
    assert num_lines <= MAX_FILE
    assert too_long(tree_of(name)) == []


def test_no_file_is_named_after_nothing() -> None:
    nothing = {"utils.py", "util.py", "common.py", "helpers.py", "helper.py", "misc.py"}
    assert [name for name in FILES if Path(name).name in nothing] == []


def test_the_namespace_is_open() -> None:
    roots = [root for root in ("services", "client", "gen") if (ROOT / root / "kvbaton").is_dir()]
    assert len(roots) == 3
    assert [root for root in roots if (ROOT / root / "kvbaton" / "__init__.py").exists()] == []


@pytest.mark.parametrize("name", SHIPPED)
def test_what_is_public_is_documented(name: str) -> None:
    tree = tree_of(name)
    assert not tree.body or ast.get_docstring(tree), "the module has no docstring"
    assert undocumented(tree) == []


@pytest.mark.parametrize("name", [name for name in SHIPPED if name.startswith("client/")])
def test_the_sdk_does_not_assert(name: str) -> None:
    """`python -O` drops an assert, and a user's mistake deserves an error with a name."""
    assert [node.lineno for node in ast.walk(tree_of(name)) if isinstance(node, ast.Assert)] == []


@pytest.mark.parametrize("name", [name for name in FILES if not MAY_READ_THE_ENVIRONMENT.fullmatch(name)])
def test_the_environment_is_read_at_the_edge_only(name: str) -> None:
    assert not reads_environment(tree_of(name))


def test_the_rules_find_what_they_look_for() -> None:
    body = "\n".join("    x = 1" for _ in range(MAX_FUNCTION))
    assert too_long(ast.parse(f"def f():\n{body}")) == ["f has 51 lines"]
    assert too_long(ast.parse(f"@d\ndef f():\n    '''doc\n    '''\n{body[:-10]}")) == []
    assert too_long(ast.parse("class C:\n" + "    x = 1\n" * MAX_CLASS)) == ["C has 251 lines"]
    assert undocumented(ast.parse("class C:\n  'c'\n  def f(self): 0\n  def _g(self): 0\nasync def h(): 0")) == [
        "h",
        "C.f",
    ]
    for source in ("import os\nos.environ['A']", "import os\nos.getenv('A')", "from os import environ"):
        assert reads_environment(ast.parse(source))
    assert not reads_environment(ast.parse("import os\nos.getpid()\n'os.environ'"))
