"""The rules of the house that a machine can check, beside the import contracts of `lint-imports`."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("overtone", "serve", "train", "ingest", "kuberay")
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
RAY_ROOMS = re.compile(
    r"serve/(app|replica|consumers|loopback)\.py"
    r"|train/(cluster|follow|job|remote|worker|rescore|stages|submission|retrainer|__main__)\.py"
    r"|ingest/actor\.py|overtone/cli/.*|benchmarks/.*"
)


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports_of(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_only_settings_reads_the_environment(path: Path) -> None:
    if name_of(path) == "overtone/settings.py":
        return
    reads = [
        node.lineno
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.Attribute) and node.attr in {"environ", "getenv"} and isinstance(node.value, ast.Name)
        if node.value.id == "os"
    ]
    assert reads == [], f"lines {reads} read the environment: ask overtone.settings"


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_ray_stays_in_its_rooms(path: Path) -> None:
    if not RAY_ROOMS.fullmatch(name_of(path)):
        assert not {name for name in imports_of(path) if name.split(".")[0] == "ray"}


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_bare_serve_and_train_mean_rays(path: Path) -> None:
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            assert not {alias.name for alias in node.names} & {"serve", "train"}, f"line {node.lineno}"


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_no_drawer_modules(path: Path) -> None:
    assert path.stem not in {"utils", "util", "common", "core", "helpers", "base", "misc"}


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_functions_fit_a_screen(path: Path) -> None:
    long = {
        node.name: node.end_lineno - node.lineno + 1
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno
        if node.end_lineno - node.lineno + 1 > 80
        if "migrations/versions" not in name_of(path)
    }
    assert long == {}


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_no_module_is_longer_than_600_lines(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 600


def test_test_folders_are_flat_and_shadow_no_package() -> None:
    folders = [path for path in (ROOT / "tests").iterdir() if path.is_dir() and path.name != "__pycache__"]
    assert {path.name for path in folders} <= {"unit", "integration", "cluster", "e2e", "model"}
    assert list((ROOT / "tests").rglob("__init__.py")) == []


def test_the_default_bundle_is_the_only_large_file() -> None:
    large = [
        name_of(path)
        for package in (*PACKAGES, "benchmarks", "configs", "docs", "tests")
        for path in (ROOT / package).rglob("*")
        if path.is_file() and path.stat().st_size > 5 * 2**20 and "__pycache__" not in path.parts
    ]
    assert set(large) <= {"overtone/bundles/default/model.onnx"}
