"""Tests of the tests and of the documentation: nothing passes because nothing was checked."""

import ast
import doctest
import importlib
import pkgutil
import socket
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

import lightning_prune
from tests import conftest

TESTS = Path(__file__).resolve().parents[1]
PACKAGE = Path(lightning_prune.__file__).parent
Function = ast.FunctionDef | ast.AsyncFunctionDef
CHECKS = ("pytest.raises", "pytest.warns", "pytest.fail", "pytest.deprecated_call")


def functions(tree: ast.AST) -> list[Function]:
    return [node for node in ast.walk(tree) if isinstance(node, Function)]


def collected(tree: ast.Module) -> list[Function]:
    """What pytest collects: functions of the module and of its Test classes, not methods that happen to begin so."""
    body = tree.body
    body = body + [n for c in body if isinstance(c, ast.ClassDef) and c.name.startswith("Test") for n in c.body]
    return [node for node in body if isinstance(node, Function) and node.name.startswith("test_")]


def checks_itself(function: Function) -> bool:
    """Whether there is an assertion in it that is not one about a constant."""
    for node in ast.walk(function):
        if isinstance(node, ast.Assert) and not isinstance(node.test, ast.Constant):
            return True
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name in CHECKS or name.rpartition(".")[2].startswith("assert_"):
                return True
    return False


def without_assertion(sources: dict[str, str]) -> list[str]:
    """Test functions that assert nothing, neither themselves nor in a function of the tests that they call."""
    trees = {file: ast.parse(source) for file, source in sources.items()}
    defined = [function for tree in trees.values() for function in functions(tree)]
    called = {
        id(f): {ast.unparse(n.func).rpartition(".")[2] for n in ast.walk(f) if isinstance(n, ast.Call)} for f in defined
    }
    checking = {f.name for f in defined if checks_itself(f)}
    while True:
        more = {f.name for f in defined if f.name not in checking and called[id(f)] & checking}
        if not more:
            break
        checking |= more
    tests = [(file, f) for file, tree in trees.items() if Path(file).name.startswith("test_") for f in collected(tree)]
    return [f"{file}::{f.name}" for file, f in tests if not checks_itself(f) and not called[id(f)] & checking]


def test_every_test_asserts() -> None:
    sources = {path.relative_to(TESTS).as_posix(): path.read_text(encoding="utf-8") for path in TESTS.rglob("*.py")}
    assert sum(source.count("\ndef test_") for source in sources.values()) > 50
    assert without_assertion(sources) == []


@pytest.mark.parametrize(
    ("body", "vacuous"),
    [
        ("print(1)", True),
        ("assert True", True),
        ("helper()", True),
        ("value == 1", True),
        ("np.array_equal(a, b)", True),
        ("assert value", False),
        ("check()", False),
        ("deep()", False),
        ("torch.testing.assert_close(a, b)", False),
        ("with pytest.raises(ValueError, match='x'):\n        f()", False),
        ("for x in y:\n        assert x", False),
    ],
)
def test_a_test_without_assertion_is_seen(body: str, vacuous: bool) -> None:
    helpers = "def helper():\n    print(1)\ndef check():\n    assert x == 1\ndef deep():\n    check()\n"
    assert (without_assertion({"helpers.py": helpers, "test_b.py": f"def test_it():\n    {body}\n"}) != []) == vacuous


def test_tests_in_classes_are_seen() -> None:
    method = "    def test_it(self):\n        print(1)\n"
    assert without_assertion({"test_a.py": f"class TestIt:\n{method}"}) == ["test_a.py::test_it"]
    assert without_assertion({"test_a.py": f"class Module:\n{method}"}) == []
    assert without_assertion({"test_a.py": "async def test_it():\n    print(1)\n"}) == ["test_a.py::test_it"]


def undocumented(source: str) -> Iterator[str]:
    """The public module, classes, functions and methods that have no docstring."""

    def visit(node: ast.Module | ast.ClassDef | Function, path: str) -> Iterator[str]:
        if node.body and not (ast.get_docstring(node) or "").strip():  # an empty __init__.py says nothing
            yield path or "the module"
        if isinstance(node, Function):
            return
        for child in node.body:
            if isinstance(child, ast.ClassDef | Function) and not child.name.startswith("_"):
                yield from visit(child, f"{path}.{child.name}".lstrip("."))

    yield from visit(ast.parse(source), "")


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_everything_public_has_a_docstring(path: Path) -> None:
    assert list(undocumented(path.read_text(encoding="utf-8"))) == []


def test_a_missing_docstring_is_seen() -> None:
    methods = "    def f(self): pass\n    def _g(self): pass\n    def __len__(self): pass\n"
    source = f"class A:\n    'doc'\n{methods}def h(): 'doc'\n"
    assert list(undocumented(source)) == ["the module", "A.f"]


MODULES = sorted(module.name for module in pkgutil.walk_packages([str(PACKAGE)], "lightning_prune."))


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings_run(name: str) -> None:
    result = doctest.testmod(importlib.import_module(name))
    assert result.failed == 0


def test_there_are_examples() -> None:
    finder = doctest.DocTestFinder()
    found = [test for name in MODULES for test in finder.find(importlib.import_module(name)) if test.examples]
    assert len(found) >= 5


@pytest.mark.parametrize("host", ["192.0.2.1", "example.org"])
def test_no_test_reaches_the_network(host: str) -> None:
    with socket.socket() as client, pytest.raises(RuntimeError, match=f"tried to reach {host}"):
        client.connect((host, 80))


def test_this_machine_can_be_reached() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as client:
        assert client.getpeername() == server.getsockname()


class Item:
    """What the choice of tiers asks of a collected test."""

    def __init__(self, path: Path, marker: str | None) -> None:
        self.path, self.marker = path, marker

    def get_closest_marker(self, name: str) -> str | None:
        return self.marker if name == self.marker else None


@pytest.mark.parametrize(
    ("arguments", "expression", "left"),
    [
        ([], "", [None]),
        (["tests"], "", [None]),
        (["tests/other.py"], "", [None]),
        (["tests", "tests/test_long.py"], "", [None, "slow", "bench", "zoo", "gpu"]),
        (["tests/test_long.py::test_it[a]"], "", [None, "slow", "bench", "zoo", "gpu"]),
        (["tests"], "bench", [None, "slow", "bench", "zoo", "gpu"]),  # pytest itself then chooses by the expression
    ],
)
def test_long_tiers_are_left_out_unless_asked_for(
    arguments: list[str], expression: str, left: list[str | None], tmp_path: Path
) -> None:
    deselected: list[Item] = []
    config = SimpleNamespace(
        option=SimpleNamespace(markexpr=expression),
        invocation_params=SimpleNamespace(dir=tmp_path),
        args=arguments,
        hook=SimpleNamespace(pytest_deselected=lambda items: deselected.extend(items)),
    )
    every = [Item(tmp_path / "tests" / "test_long.py", marker) for marker in (None, "slow", "bench", "zoo", "gpu")]
    items = list(every)
    conftest.pytest_collection_modifyitems(config, items)
    assert [item.marker for item in items] == left
    assert set(items) | set(deselected) == set(every)
    assert not set(items) & set(deselected)
