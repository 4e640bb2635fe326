"""What holds the house together: floors, no cycles, one documented page, a light and harmless import."""

from __future__ import annotations

import ast
import graphlib
import inspect
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import stablekl
import stablekl.data
from stablekl import linalg, special

PACKAGE = Path(stablekl.__file__).parent
ROOT = PACKAGE.parent

# The floor of a module, or of everything in a subpackage. A module may import from its own floor and below.
FLOORS = {
    "_autograd": 0,
    "_bregman": 0,
    "_deviance": 0,
    "_double": 0,
    "_double_gamma": 0,
    "_elementwise": 0,
    "_fused": 0,
    "_opaque": 0,
    "_residual": 0,
    "_scaled": 0,
    "_wide": 0,
    "_normal_tail": 0,
    "_distributed": 0,
    "_progress": 0,
    "special": 0,
    "linalg": 0,
    "quadrature": 0,
    "parameterizations": 0,
    "data": 0,
    "registry": 1,
    "distributions": 2,
    "mixtures": 3,
    "divergences": 4,
    "estimators": 4,
    "losses": 5,
    "fit": 5,
    "precision": 6,
    "_plot": 6,
    "": 7,  # stablekl/__init__.py
    "__main__": 8,
}
# In the precision suite a module imports from its own place and those to the left; "" is the package itself.
PRECISION = (
    *("references", "metrics", "batches", "subject", "subjects", "search", "exhaustive", "rows"),
    *("ratchet", "run", "measure", "render", "", "__main__"),
)
# Packages beyond the standard library that a module may import, by its name's first part.
RUNTIME = {"torch", "numpy"}
OPTIONAL = {"precision": {"mpmath", "hypothesis", "rich", "matplotlib"}, "_plot": {"matplotlib"}}


def module_name(path: Path) -> str:
    """``mixtures.select`` for stablekl/mixtures/select.py, and the empty string for stablekl/__init__.py."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}
TREES = {name: ast.parse(path.read_text(encoding="utf-8"), str(path)) for name, path in SOURCES.items()}


def imported(name: str, tree: ast.AST) -> Iterator[str]:
    """Absolute dotted names that a module imports; ``from a import b`` counts as ``a.b``."""
    package = name if SOURCES[name].name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            origin = node.module or ""
            if node.level:
                above = ["stablekl", *filter(None, package.split("."))]
                origin = ".".join([*above[: len(above) - node.level + 1], *filter(None, [origin])])
            yield from (f"{origin}.{alias.name}" for alias in node.names)


def resolve(dotted: str) -> str | None:
    """The module of this package that ``dotted`` names or lives in; None for another package."""
    parts = dotted.split(".")
    if parts[0] != "stablekl":
        return None
    for end in range(len(parts), 1, -1):
        if ".".join(parts[1:end]) in SOURCES:
            return ".".join(parts[1:end])
    return ""


GRAPH = {
    name: {target for d in imported(name, tree) if (target := resolve(d)) is not None} - {name}
    for name, tree in TREES.items()
}


def floor(name: str) -> int:
    """The floor a module is on."""
    return FLOORS[name.partition(".")[0]]


def run(code: str) -> str:
    """Standard output of a fresh interpreter that runs ``code``."""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# --- the tree ---------------------------------------------------------------------------------------


def test_every_module_has_a_floor():
    unknown = {name.partition(".")[0] for name in SOURCES} - FLOORS.keys()
    assert not unknown, f"say in FLOORS where these belong: {sorted(unknown)}"


def test_imports_point_down():
    up = [f"{a} -> {b}" for a, targets in GRAPH.items() for b in targets if floor(b) > floor(a)]
    assert not up


def test_imports_of_the_precision_suite_point_left():
    place = {name: i for i, name in enumerate(PRECISION)}
    parts = {name: [*name.split("."), ""] for name in GRAPH if name.partition(".")[0] == "precision"}
    edges = [(parts[a][1], parts[b][1]) for a in parts for b in GRAPH[a] & parts.keys()]
    assert {name for edge in edges for name in edge} == set(PRECISION), "say in PRECISION where it belongs"
    assert [f"{a} -> {b}" for a, b in edges if place[b] > place[a]] == []


def test_nothing_imports_the_precision_suite():
    """Its packages are an extra."""
    others = [name for name in GRAPH if name.partition(".")[0] != "precision"]
    assert not [f"{a} -> {b}" for a in others for b in GRAPH[a] if b.partition(".")[0] == "precision"]
    assert run("import sys, stablekl; print('stablekl.precision' in sys.modules)") == "False\n"


def test_no_cycles():
    graphlib.TopologicalSorter(GRAPH).prepare()


def test_the_checks_can_fail():
    assert resolve("stablekl.special.log1pmx") == "special"
    assert resolve("stablekl.Normal") == ""
    assert resolve("torch.special") is None
    assert floor("") > floor("special")
    with pytest.raises(graphlib.CycleError):
        graphlib.TopologicalSorter({"a": {"b"}, "b": {"a"}}).prepare()


@pytest.mark.parametrize("name", SOURCES)
def test_imports_stand_at_the_top(name):
    inside = [
        node.lineno
        for function in ast.walk(TREES[name])
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
        for node in ast.walk(function)
        if isinstance(node, (ast.Import, ast.ImportFrom))
    ]
    assert not inside


@pytest.mark.parametrize("name", SOURCES)
def test_only_torch_and_numpy_at_run_time(name):
    allowed = {"stablekl", *RUNTIME, *OPTIONAL.get(name.partition(".")[0], ()), *sys.stdlib_module_names}
    assert {d.partition(".")[0] for d in imported(name, TREES[name])} <= allowed


@pytest.mark.parametrize("name", SOURCES)
def test_source_habits(name):
    text = SOURCES[name].read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 400, "is this still one topic?"
    assert ast.get_docstring(TREES[name]), "a module says what it is for"
    asserts = [node.lineno for node in ast.walk(TREES[name]) if isinstance(node, ast.Assert)]
    assert not asserts, "an error of the user is a ValueError, since `python -O` drops asserts"
    assert not [word for word in ("TODO", "FIXME", "XXX") if word in text]


# --- the public page --------------------------------------------------------------------------------


def test_all_resolves_and_is_sorted():
    assert sorted(stablekl.__all__) == list(stablekl.__all__)
    assert len(set(stablekl.__all__)) == len(stablekl.__all__)
    missing = [name for name in stablekl.__all__ if not hasattr(stablekl, name)]
    assert not missing


def test_the_facade_holds_imports_and_nothing_else():
    allowed = (ast.Import, ast.ImportFrom, ast.Assign, ast.Expr)
    assert all(isinstance(node, allowed) for node in TREES[""].body)


def test_modules_are_attributes():
    assert isinstance(special, ModuleType)
    assert isinstance(linalg, ModuleType)
    assert stablekl.special is special


def public() -> Iterator[tuple[str, object]]:
    """All that a public name reaches: the package's, those of its modules, the methods of its classes."""
    spaces = [stablekl, *(getattr(stablekl, name) for name in stablekl.__all__)]
    for space in spaces:
        if isinstance(space, ModuleType):
            for name in space.__all__:
                yield f"{space.__name__}.{name}", getattr(space, name)
        elif inspect.isclass(space):
            for name, member in vars(space).items():
                if not name.startswith("_") and (inspect.isfunction(member) or isinstance(member, property)):
                    yield f"{space.__name__}.{name}", inspect.getattr_static(space, name)


def test_every_public_name_is_documented():
    bare = [
        name
        for name, thing in public()
        if (callable(thing) or isinstance(thing, (ModuleType, property))) and not inspect.getdoc(thing)
    ]
    assert not bare


def test_constructors_name_their_arguments():
    classes = [thing for _, thing in public() if inspect.isclass(thing) and "__init__" in vars(thing)]
    bare = [
        f"{cls.__name__}({name})"
        for cls in classes
        for name in list(inspect.signature(cls).parameters)
        if name not in (inspect.getdoc(cls) or "") + (inspect.getdoc(cls.__init__) or "")
    ]
    assert not bare


# --- the import -------------------------------------------------------------------------------------


def test_import_is_light():
    code = """
import sys, time, torch
before, start = set(sys.modules), time.perf_counter()
import stablekl
print(f"{time.perf_counter() - start:.3f}")
heavy = {"mpmath", "hypothesis", "scipy", "matplotlib", "rich", "sympy", "torch._dynamo", "torch._inductor"}
print(*heavy & (set(sys.modules) - before))
"""
    seconds, heavy = run(code).splitlines()
    print(f"import stablekl adds {seconds} s to import torch")
    assert heavy == ""


def test_import_leaves_global_state_alone():
    out = run(
        "import torch, warnings\n"
        "def state():\n"
        "    return (torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled(),\n"
        "            torch.distributions.Distribution._validate_args, torch.get_rng_state().sum().item(),\n"
        "            warnings.filters[:])\n"
        "before = state(); import stablekl; print(before == state())"
    )
    assert out.split() == ["True"]


def test_import_leaves_torch_rules_as_they_were():
    out = run(
        """
import warnings, torch
from torch.distributions import kl
warnings.simplefilter("ignore")  # torch warns of its own ambiguous pairs
classes = [getattr(torch.distributions, name) for name in torch.distributions.__all__]
classes = [c for c in classes if isinstance(c, type) and issubclass(c, torch.distributions.Distribution)]
def resolved():
    return {(p, q): kl._dispatch_kl(p, q) for p in classes for q in classes}
registry, before = dict(kl._KL_REGISTRY), resolved()
import stablekl
after = resolved()
changed = [k for k, rule in registry.items() if kl._KL_REGISTRY.get(k) is not rule]
shadowed = [k for k, rule in before.items() if rule is not NotImplemented and after[k] is not rule]
# of these torch finds the rule of transformed distributions, or of exponential families, which raise
# NotImplementedError
lacking = {(c, c) for c in ("Weibull", "Kumaraswamy", "RelaxedBernoulli", "RelaxedOneHotCategorical")}
both = {("Beta", "Dirichlet"), ("LogNormal", "Weibull")}
lacking |= both | {(q, p) for p, q in both}
shadowed = [k for k in shadowed if (k[0].__name__, k[1].__name__) not in lacking]
print(len(registry) > 50, sum(r is not NotImplemented for r in before.values()) > 100, changed, shadowed)
"""
    )
    assert out.split("\n")[0] == "True True [] []"


# --- the page a stranger reads ----------------------------------------------------------------------


def test_readme_examples_run():
    # In an interpreter of its own, because the first lines show torch before stablekl is imported.
    code = "import doctest; print(*doctest.testfile('README.md', module_relative=False, optionflags=12))"
    if (ROOT / "README.md").exists():  # not installed with the package
        failed, tried = run(code).splitlines()[-1].split()
        assert int(failed) == 0, run(code)
        assert int(tried) > 5
