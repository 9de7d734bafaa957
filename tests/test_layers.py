"""The direction of imports, read from the syntax trees; imports inside functions count as well."""

import ast
from graphlib import TopologicalSorter

import pytest
from conftest import ROOT

# Each module may import from its own layer and from lower ones. The longest matching prefix counts.
LAYERS = (
    {"lib.errors", "lib.variants", "lib.files", "lib.cli", "lib.tables", "lib.charts", "lib.locks",
     "lib.fonts", "lib.drawing", "lib.threads", "lib.terminal"},  # without torch
    {"utils"},
    {"refer", "bert", "lib.vision_encoder", "lib.fusion", "lib.seg_decoder",
     "lib.kernels", "lib.precision", "lib.network"},
    {"CrossVLT", "lib.inference", "lib.state_dict", "lib.safe_load", "lib.options", "lib.config", "data"},
    {"lib.rivals", "lib.models", "lib.checkpoint", "lib.criterion", "lib.optim", "lib.metrics", "lib.protocols",
     "lib.collector", "lib.evaluation", "lib.baselines", "lib.visualize", "lib.polygons", "lib.engine",
     "refer.prepare"},
    {"lib.loading", "lib.predictor", "lib.report", "lib.segment"},
    {"lib.compare"},
)  # fmt: skip
# Entry files may import anything (after parsing their arguments). No module imports them.
TOOLS = {"train", "test", "lib.plot", "lib.rescore"}
WITHOUT_TORCH = ("lib.errors", "lib.variants", "lib.files", "lib.cli", "lib.tables", "lib.threads", "lib.options",
                 "lib.config")  # fmt: skip
HEAVY = {"torch", "torchvision", "timm", "transformers", "numpy", "PIL", "pycocotools", "matplotlib", "pandas", "scipy"}
VISION, LANGUAGE = {"lib.vision_encoder", "lib.fusion", "lib.seg_decoder"}, "bert"


def find_modules():
    """Return {dotted name: syntax tree} of all modules except the tests."""
    paths = sorted(ROOT.glob("*.py")) + sorted(ROOT.glob("[!.]*/**/*.py"))
    return {
        ".".join(path.relative_to(ROOT).with_suffix("").parts): ast.parse(path.read_text(encoding="utf-8"))
        for path in paths
        if path.parent.name != "tests"
    }


MODULES = find_modules()


def is_entry(name):
    return name in TOOLS or name.endswith("__main__") or name.startswith("benchmarks")


def layer(name):
    """Return the index into LAYERS of the longest listed prefix of ``name``."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        for index, members in enumerate(LAYERS):
            if ".".join(parts[:end]) in members:
                return index
    raise AssertionError(f"{name} is in no layer")


def imported_names(nodes):
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def project_imports(name):
    """Yield the modules of the project that a module imports, inside functions as well."""
    for imported in imported_names(ast.walk(MODULES[name])):
        parts = imported.split(".")
        for end in range(len(parts), 0, -1):
            if ".".join(parts[:end]) in MODULES:
                yield ".".join(parts[:end])
                break


@pytest.mark.parametrize("name", [name for name in MODULES if not name.endswith("__init__")])
def test_imports_point_downwards(name):
    for imported in project_imports(name):
        shared = imported.startswith("benchmarks") and name.startswith("benchmarks")
        assert shared or not is_entry(imported), f"{name} imports the entry file {imported}"
        assert is_entry(name) or layer(imported) <= layer(name), f"{name} imports {imported}"
        if name in VISION:
            assert imported.split(".")[0] != LANGUAGE, f"{name} imports {imported}"
        if name.startswith(LANGUAGE):
            assert imported not in VISION, f"{name} imports {imported}"


def test_no_import_cycles():
    TopologicalSorter({name: set(project_imports(name)) for name in MODULES}).prepare()


@pytest.mark.parametrize("name", WITHOUT_TORCH)
def test_the_bottom_layer_imports_no_heavy_package(name):
    assert not HEAVY & {imported.split(".")[0] for imported in imported_names(ast.walk(MODULES[name]))}


def test_only_config_and_tools_use_argparse():
    for name, tree in MODULES.items():
        uses_argparse = any(imported.split(".")[0] == "argparse" for imported in imported_names(ast.walk(tree)))
        functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        if uses_argparse and name not in ("lib.cli", "lib.config"):
            assert {"get_parser", "main"} <= functions, f"{name} uses argparse without being a tool"


def test_importing_a_module_runs_no_code():
    """Statements at module level only define, import or guard."""
    for name, tree in MODULES.items():
        for node in tree.body:
            if isinstance(node, ast.Expr):
                assert isinstance(node.value, ast.Constant), f"{name}:{node.lineno} runs at import"
            elif isinstance(node, ast.For | ast.While | ast.With | ast.Try):
                pytest.fail(f"{name}:{node.lineno} runs at import")
            elif isinstance(node, ast.If):
                test = ast.unparse(node.test)
                assert "__name__" in test or test == "TYPE_CHECKING", f"{name}:{node.lineno} runs at import"


def test_init_files_are_empty_and_tests_are_flat():
    for path in ROOT.glob("[!.]*/**/__init__.py"):
        if ".venv" not in path.parts:
            assert path.read_text() == "", path
    assert not (ROOT / "tests" / "__init__.py").exists()


@pytest.mark.parametrize(("name", "max_lines"), [("train", 250), ("test", 200)])
def test_entry_scripts_stay_short(name, max_lines):
    assert len((ROOT / f"{name}.py").read_text().splitlines()) <= max_lines


def test_functions_have_at_most_eight_parameters():
    """Builders and command-line code may have more."""
    for name, tree in MODULES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("build_"):
                args = node.args
                count = len(
                    [arg for arg in args.posonlyargs + args.args + args.kwonlyargs if arg.arg not in ("self", "cls")]
                )
                is_dataset = node.name == "__init__" and name == "data.dataset_refer_bert"
                assert count <= 8 or is_dataset or is_entry(name), f"{name}.{node.name} has {count} parameters"
