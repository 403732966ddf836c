"""Who may import whom, and how long a file may be."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def sources(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imported(path: Path) -> set[str]:
    """The top-level packages that a file imports anywhere, inside functions and TYPE_CHECKING blocks included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import hides which package it reaches"
            found.add((node.module or "").partition(".")[0])
    return found


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_the_reader_of_imports_sees_them(tmp_path):
    code = "import os.path as p\ndef f():\n    from ray.serve import run\n    import actors, numpy\n"
    (tmp_path / "x.py").write_text(code)
    assert imported(tmp_path / "x.py") == {"os", "ray", "actors", "numpy"}
    assert len(sources("rl")) > 20
    assert len(sources("actors")) > 10


@pytest.mark.parametrize("path", sources("rl"), ids=name)
def test_rl_knows_neither_ray_nor_the_actors_nor_serving(path):
    assert not imported(path) & {"ray", "actors", "serve"}


@pytest.mark.parametrize("path", sources("actors"), ids=name)
def test_only_the_serve_commands_of_the_actors_know_serving(path):
    if path != ROOT / "actors" / "serve_commands.py":
        assert "serve" not in imported(path)


def test_the_command_line_imports_serving_only_inside_a_command():
    """So that training needs nothing that serving needs."""
    tree = ast.parse((ROOT / "actors" / "serve_commands.py").read_text())
    top = [n for n in tree.body if isinstance(n, ast.Import | ast.ImportFrom)]
    modules = {alias.name for n in top if isinstance(n, ast.Import) for alias in n.names}
    modules |= {n.module for n in top if isinstance(n, ast.ImportFrom)}
    assert not {m for m in modules if m and m.partition(".")[0] == "serve"}


@pytest.mark.parametrize("path", sources("rl/algo"), ids=name)
def test_mathematics_needs_torch_and_numpy_only(path):
    assert imported(path) <= {"torch", "numpy", "rl", *sys.stdlib_module_names}


@pytest.mark.parametrize("module", ["rl.config", "rl.config_file"])
def test_the_configuration_imports_no_torch(module):
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize("path", sources("rl") + sources("actors") + sources("serve"), ids=name)
def test_no_file_is_too_long_to_read(path):
    assert len(path.read_text().splitlines()) <= 400
