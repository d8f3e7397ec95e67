"""Imports run one way: utils ← models ← {train, inversion} ← the scripts."""

import ast

import pytest

from tests.support import ROOT

ALLOWED = {
    "utils": {"utils"},
    "models": {"utils", "models"},
    "train": {"utils", "models", "train"},
    "inversion": {"utils", "models", "inversion"},
}
PROJECT = set(ALLOWED) | {"training", "run", "tests", "benchmarks"}
#: The attack is tensors in, tensors out.
FORBIDDEN_IN_INVERSION = {"argparse", "matplotlib", "os", "sys", "pathlib", "io", "json", "csv"}
FILES = [path for folder in ALLOWED for path in sorted((ROOT / folder).rglob("*.py"))]
#: The attack itself; what runs and judges it, in audit/, prints and writes.
SCIENCE = [path for path in FILES if "inversion" in path.parts and "audit" not in path.parts]


def imported(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_one_way(path):
    folder = path.relative_to(ROOT).parts[0]
    names = set(imported(ast.parse(path.read_text())))
    tops = {name.split(".")[0] for name in names}
    assert tops & PROJECT <= ALLOWED[folder]
    if path.name not in ("shard.py", "launch.py"):
        assert not any(name.startswith("torch.distributed") for name in names)
    if folder == "inversion" and "audit" not in path.parts:
        assert not any(name.startswith("inversion.audit") for name in names)
        assert not tops & FORBIDDEN_IN_INVERSION


def test_torchvision_is_imported_where_it_is_used():
    """It takes a second with torch's compiler, and runs without an optimiser need neither."""
    for path in FILES:
        body = ast.parse(path.read_text()).body
        top = ast.Module([n for n in body if isinstance(n, ast.Import | ast.ImportFrom)], [])
        assert not {"torchvision", "lpips"} & {n.split(".")[0] for n in imported(top)}


def test_ray_is_imported_by_a_search_alone():
    """Without ray everything but a search works: it is imported inside functions of one file."""
    for path in FILES:
        tree = ast.parse(path.read_text())
        if path.name != "tune.py":
            assert not any(name.split(".")[0] == "ray" for name in imported(tree))
        top = ast.Module([n for n in tree.body if isinstance(n, ast.Import | ast.ImportFrom)], [])
        assert not {"ray", "optuna", "hpbandster"} & {n.split(".")[0] for n in imported(top)}


@pytest.mark.parametrize("path", SCIENCE, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_attack_neither_prints_nor_opens_files(path):
    called = {
        node.func.id
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    assert not called & {"print", "open", "input"}


def test_the_rule_sees_every_folder():
    assert {path.relative_to(ROOT).parts[0] for path in FILES} == set(ALLOWED)
    assert len(FILES) >= 15
