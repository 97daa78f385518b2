"""The house keeps its rules: who imports whom, how long files and functions are, what must be declared."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[1]
MAY_IMPORT = {  # folder: the folders that it may import, besides itself
    "common": set(),
    "preprocessing": {"common"},
    "models": {"common"},
    "training": {"common", "preprocessing", "models"},
    "evaluation": {"common", "preprocessing", "models"},
    "benchmarks": {"common", "preprocessing", "models", "training", "evaluation"},
}
MODULES = sorted(path for folder in MAY_IMPORT for path in (PROJECT / folder).glob("*.py"))
TESTS = sorted((PROJECT / "tests").glob("*.py"))
MOST_LINES, MOST_LINES_OF_FUNCTION, MOST_ARGUMENTS, WIDEST = 380, 50, 6, 120
PARSERS = re.compile(r"_?(parse|make_parser)")  # functions that only build an argparse parser may be long
NAMES = {"skimage": "scikit-image", "sklearn": "scikit-learn", "PIL": "pillow", "yaml": "pyyaml"}


def name_module(path: Path) -> str:
    return ".".join(path.relative_to(PROJECT).with_suffix("").parts)


def list_imports(path: Path) -> set[str]:
    """Every module that a file may import, `from a import b` as a and as a.b."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def is_script(path: Path) -> bool:
    return '__name__ == "__main__"' in path.read_text(encoding="utf-8")


def list_functions(path: Path) -> list[ast.FunctionDef]:
    return [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.FunctionDef)]


def refuse_long_files(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= MOST_LINES, f"{path.name}: {len(lines)} lines"
    assert max(map(len, lines), default=0) <= WIDEST, path.name


@pytest.mark.parametrize("path", MODULES, ids=name_module)
def test_folders_depend_one_way_and_scripts_are_not_imported(path):
    folder = path.parent.name
    scripts = {name_module(module) for module in MODULES if is_script(module)}
    for module in list_imports(path):
        top = module.split(".")[0]
        assert top not in MAY_IMPORT or top == folder or top in MAY_IMPORT[folder], module
        assert module not in scripts, f"the script {module} is imported"


@pytest.mark.parametrize("path", MODULES, ids=name_module)
def test_files_and_functions_are_short(path):
    refuse_long_files(path)
    for function in list_functions(path):
        length = function.end_lineno - function.lineno + 1
        assert length <= MOST_LINES_OF_FUNCTION or PARSERS.match(function.name), f"{function.name}: {length} lines"
        arguments = function.args
        names = [one.arg for one in arguments.posonlyargs + arguments.args + arguments.kwonlyargs]
        count = len([name for name in names if name not in ("self", "cls")])
        assert count <= MOST_ARGUMENTS, f"{function.name}: {count} arguments"


def test_files_of_tests_are_short_too():
    for path in TESTS:
        refuse_long_files(path)


@pytest.mark.parametrize("path", [path for path in MODULES if is_script(path)], ids=name_module)
def test_scripts_open_and_end_alike(path):
    text = path.read_text(encoding="utf-8")
    assert "if not __package__:\n    sys.path[0] = str(Path(__file__).resolve().parents[1])\n" in text
    assert '\n\nif __name__ == "__main__":\n    stop_in_one_line()  # while the rest is imported\n\n' in text
    assert text.endswith('\n\nif __name__ == "__main__":\n    run_script(main)\n')


@pytest.mark.parametrize("path", MODULES, ids=name_module)
def test_only_scripts_touch_the_path_of_imports(path):
    assert is_script(path) or "sys.path" not in path.read_text(encoding="utf-8")


def test_what_is_imported_is_declared():
    lines = (PROJECT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    lines += (PROJECT / "requirements-dask.txt").read_text(encoding="utf-8").splitlines()
    declared = {re.split(r"[=<>\[ ]", line)[0].lower() for line in lines if line and not line.startswith(("#", "-"))}
    own = {*MAY_IMPORT, "tests"}
    for path in [*MODULES, *TESTS]:
        for module in list_imports(path):
            top = module.split(".")[0]
            if top not in own and top not in sys.stdlib_module_names:
                assert NAMES.get(top, top).lower() in declared, f"{name_module(path)} imports {top}"


def test_the_store_needs_no_torch_and_no_script_needs_dask():
    for module, unwanted in (("preprocessing.store", "torch"), ("preprocessing.preprocess_oasis", "distributed")):
        code = f"import sys, {module}; sys.exit({unwanted!r} in sys.modules)"
        assert subprocess.run([sys.executable, "-c", code], cwd=PROJECT).returncode == 0, f"{module}: {unwanted}"


def test_tests_bind_no_private_name():
    for path in TESTS:
        for module in list_imports(path):
            assert not any(is_private(part) for part in module.split(".")), f"{path.name} imports {module}"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            private = isinstance(node, ast.Attribute) and is_private(node.attr)
            assert not private or ast.unparse(node.value) == "os", f"{path.name}: {ast.unparse(node)}"
