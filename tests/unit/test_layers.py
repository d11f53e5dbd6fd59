"""Dependencies point one way, as docs/ARCHITECTURE.md says; modules stay small enough to be read."""

import ast
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((ROOT / "polyvisor").rglob("*.py"))
}
# Drivers know how a VM's directory is laid out, and nothing else of the host.
STORE = {"polyvisor.host.store", "polyvisor.host.record"}


@cache
def imports(module: str, *, late: bool) -> frozenset[str]:
    """Modules of ours that `module` imports; with `late` also inside functions. Imports for types alone don't count."""
    found: set[str] = set()
    todo: list[ast.AST] = [ast.parse(MODULES[module].read_text())]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and not late:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import"
            for alias in node.names:
                below = f"{node.module}.{alias.name}"
                found.add(below if below in MODULES else str(node.module))
        todo += ast.iter_child_nodes(node)
    return frozenset(name for name in found if name in MODULES and name != module)


def within(name: str, *packages: str) -> bool:
    return any(name == p or name.startswith(f"{p}.") for p in (f"polyvisor.{p}" for p in packages))


BELOW = ("errors", "waiting", "files", "process", "operation", "home", "spec", "status", "wheel")


@pytest.mark.parametrize(
    ("package", "may"),
    [
        ("errors", ()),
        ("operation", ()),
        ("waiting", ()),
        ("files", ("errors", "waiting")),
        ("process", ("errors", "waiting")),
        ("home", ("errors", "files")),
        ("wheel", ()),
        ("spec", ("errors", "files", "spec")),
        ("status", ("spec",)),
        ("network", (*BELOW, "network")),
        ("storage", (*BELOW, "images", "storage")),
        ("images", (*BELOW, "images")),
        ("drivers", (*BELOW, "drivers", "network")),
        ("host", (*BELOW, "drivers", "network", "images", "storage", "host")),
        ("ssh", (*BELOW, "host")),
        ("remote", (*BELOW, "drivers", "network", "images", "storage", "host", "remote", "ssh")),
        ("lab", (*BELOW, "drivers", "images", "storage", "host", "remote", "ssh", "lab")),
        ("compare", (*BELOW, "host", "remote", "ssh", "compare")),
    ],
)
def test_what_a_package_may_know(package: str, may: tuple[str, ...]) -> None:
    modules = [name for name in MODULES if within(name, package)]
    assert modules
    wrong = {
        (name, known)
        for name in modules
        for known in imports(name, late=True)
        if not within(known, *may)
        and known not in ("polyvisor", "polyvisor.values")
        and not (package == "drivers" and known in STORE)
    }
    assert wrong == set()


def test_nothing_below_knows_the_command_line() -> None:
    wrong = {
        (name, known)
        for name in MODULES
        if not within(name, "cli") and name != "polyvisor.__main__"
        for known in imports(name, late=True)
        if within(known, "cli")
    }
    assert wrong == set()


def test_imports_go_round_in_no_circle() -> None:
    try:
        TopologicalSorter({name: imports(name, late=False) for name in MODULES}).prepare()
    except CycleError as error:
        pytest.fail(f"a circle of imports: {' → '.join(error.args[1])}")


@pytest.mark.parametrize("module", MODULES)
def test_no_module_is_too_long_to_be_read(module: str) -> None:
    assert len(MODULES[module].read_text().splitlines()) <= 500


def test_every_module_says_what_it_is_for() -> None:
    silent = [
        name
        for name, path in MODULES.items()
        if path.read_text() and not ast.get_docstring(ast.parse(path.read_text()))
    ]
    assert silent == []


@pytest.mark.parametrize(
    ("used", "only"),
    [
        ("qemu.qmp", {"polyvisor.drivers.qemu.qmp"}),
        ("subprocess", {"polyvisor.process", "polyvisor.cli.ssh"}),
        ("numpy", {"polyvisor.compare.statistics"}),
        ("scipy.stats", {"polyvisor.compare.statistics"}),
    ],
)
def test_one_place_for_each_thing(used: str, only: set[str]) -> None:
    """`subprocess` is imported by the command line to hand its terminal to ssh."""
    users = set()
    for name, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if (isinstance(node, ast.Import) and used in [a.name for a in node.names]) or (
                isinstance(node, ast.ImportFrom) and node.module == used
            ):
                users.add(name)
    assert users <= only


def test_the_core_is_what_the_project_depends_on() -> None:
    """Hosts get the core alone: what it imports from others stands in `dependencies`."""
    import sys
    import tomllib

    declared = {
        "qemu.qmp": "qemu",
        "pyyaml": "yaml",
        "rich": "rich",
        "argcomplete": "argcomplete",
        "pycdlib": "pycdlib",
    }
    with (ROOT / "pyproject.toml").open("rb") as file:
        wanted = tomllib.load(file)["project"]["dependencies"]
    names = {dependency.split(">")[0].split("=")[0].strip() for dependency in wanted}
    assert names == declared.keys()
    found = set()
    # Comparing is for the machine that compares: what its statistics need is an extra, and never asked of a host.
    for path in (path for name, path in MODULES.items() if name != "polyvisor.compare.statistics"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                found.add(node.module.split(".")[0])
    later = {"compression"}  # of the standard library, from Python 3.14 on
    assert found - set(sys.stdlib_module_names) - later - {"polyvisor"} <= set(declared.values())
