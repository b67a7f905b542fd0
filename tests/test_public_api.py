"""What `from fromage import ...` gives: the same names to people, to Python and to type checkers."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from type_checker import type_check

import fromage
import fromage.octopus


def typed_imports(module):
    """name -> module, of the imports under TYPE_CHECKING."""
    tree = ast.parse(Path(module.__file__).read_text(encoding="utf-8"))
    block = next(n for n in tree.body if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING")
    return {alias.asname: node.module for node in block.body for alias in node.names}


@pytest.mark.parametrize("module", [fromage, fromage.octopus])
def test_type_checkers_read_what_python_imports(module):
    assert typed_imports(module) == module._MODULES
    for name in module.__all__:
        assert getattr(module, name) is not None


def test_the_package_says_what_it_has():
    assert set(fromage.__all__) < set(dir(fromage)) and fromage.__version__[0].isdigit()
    with pytest.raises(AttributeError, match="no attribute 'Gromage'"):
        fromage.Gromage  # noqa: B018


def test_importing_the_package_imports_no_library():
    program = "import sys, fromage; print([m for m in ('torch', 'transformers', 'numpy', 'faiss') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout.strip() == "[]"


def test_types_are_known_to_a_type_checker(tmp_path):
    path = tmp_path / "user.py"
    path.write_text(
        "from fromage import Chat, Fromage, caption\n"
        "model = Fromage.from_pretrained('folder')\n"
        "texts: list[str] = caption(model, [])\n"
        "wrong: int = caption(model, [])\n"
        "Chat(model).shout('a')\n"
    )
    done = type_check(path)
    assert [line.partition(": error: ")[0].rpartition(":")[2] for line in done.stdout.splitlines() if "error:" in line] == [
        "4",
        "5",
    ], done.stdout
