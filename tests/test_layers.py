"""The direction of imports, read off the syntax trees."""

import ast

import pytest
from conftest import ROOT

# Each module imports only from rooms of a lower layer, or from its own.
NETWORK = {"lib.vision_encoder", "lib.fusion", "lib.seg_decoder"}
LAYERS = {"utils": 1, "refer": 1, "bert": 2, "CrossVLT": 3, "data": 3, "train": 5, "test": 5, "benchmarks": 5}
TOOLS = 5  # what a tool's get_parser() and main() are, whatever room it is in
MAY_SEE_ARGPARSE = {"lib.config"}


def modules():
    for path in sorted(ROOT.glob("*.py")) + sorted(ROOT.glob("[!.]*/**/*.py")):
        if path.parent.name != "tests":
            yield ".".join(path.relative_to(ROOT).with_suffix("").parts), path


def layer(name):
    if name.startswith("lib"):
        return 2 if name in NETWORK else 4
    return LAYERS[name.split(".")[0]]


def imports(tree, *, of_tools=True):
    """Names that are imported, by default also inside of a tool's get_parser() and main()."""
    nodes = list(ast.walk(tree))
    if not of_tools:
        tools = [one for one in tree.body if isinstance(one, ast.FunctionDef) and one.name in {"get_parser", "main"}]
        apart = {id(node) for tool in tools for node in ast.walk(tool)}
        nodes = [node for node in nodes if id(node) not in apart]
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from ((alias.name, node) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module, node


@pytest.mark.parametrize(("name", "path"), list(modules()), ids=lambda value: value if isinstance(value, str) else "")
def test_imports_go_down(name, path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    rooms = {"utils", "refer", "bert", "lib", "CrossVLT", "data", "train", "test", "benchmarks"}
    for imported, _ in imports(tree):
        if imported and imported.split(".")[0] in rooms:
            assert layer(imported) <= TOOLS - 1 or layer(name) == TOOLS, f"{name} imports {imported}"
    for imported, _ in imports(tree, of_tools=False):
        if imported and imported.split(".")[0] in rooms:
            assert layer(imported) <= layer(name), f"{name} imports {imported}"
            if layer(imported) == layer(name) == 5:
                assert imported.startswith("benchmarks."), f"nobody imports {imported}"
            if layer(name) == 4:
                assert imported.split(".")[0] in {"utils", "refer", "lib"}, f"{name} imports {imported}"
    if layer(name) == 2:
        other = "bert" if name.startswith("lib") else "lib"
        for imported, _ in imports(tree, of_tools=False):
            assert (imported or "").split(".")[0] != other, f"vision and language meet in {name}"


def test_only_config_and_mains_parse_arguments():
    for name, path in modules():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if any(imported == "argparse" for imported, _ in imports(tree)) and name not in MAY_SEE_ARGPARSE:
            functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
            assert {"get_parser", "main"} <= functions, f"{name} uses argparse without being a tool"


def test_nothing_happens_at_import():
    """Top-level statements only define, import or guard."""
    for name, path in modules():
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Expr):
                assert isinstance(node.value, ast.Constant), f"{name}:{node.lineno} runs at import"
            elif isinstance(node, ast.For | ast.While | ast.With | ast.Try):
                pytest.fail(f"{name}:{node.lineno} runs at import")
            elif isinstance(node, ast.If):
                assert "__name__" in ast.unparse(node.test), f"{name}:{node.lineno} runs at import"


def test_rooms_are_empty_packages_and_tests_are_flat():
    for room in ("lib", "lib/engine", "lib/report", "bert", "data", "refer"):
        assert (ROOT / room / "__init__.py").read_text() == ""
    assert not (ROOT / "tests" / "__init__.py").exists()
