"""What the documentation's site is made of, as a hook of MkDocs: `make docs`.

The site has the repository's own tree, so that links which work on GitHub work there as well. Beside the pages that
are there it has some that are made: the options of every command and the reference of the package, both from its
source, and the tutorial as a page.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import nbformat
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from nbclient import NotebookClient
from nbconvert import MarkdownExporter

from pi05_lightning.cli import help as of_commands
from pi05_lightning.cli.layers import GROUPS
from pi05_lightning.cli.main import COMMANDS, TRAINER_COMMANDS
from pi05_lightning.cli.signatures import Found, Option, options_of, sentence, subclasses
from pi05_lightning.evaluation.report.tables import markdown_table

ROOT = Path(__file__).parents[1]
_SHIPPED = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "benchmarks/NOTES.md")
PAGES = (*_SHIPPED, "docs/*.md", "experiments/*.md", "experiments/*/*.md")
FILES = ("LICENSE", "docs/images/*", "configs/**/*.*", "examples/*.py", "experiments/*/*.*", "benchmarks/*.py")
"""What pages show or link to."""
TUTORIAL = "docs/tutorial.ipynb"
COMMAND_PAGES, PYTHON_PAGES = "reference/commands/", "reference/python/"
API = {
    "Policy": ("policy", "acting.inference", "acting.options", "types"),
    "Training": (
        "module.pi05_module",
        "recipe",
        "losses",
        "optim",
        "training.callbacks.stages",
        "training.callbacks.ema",
    ),
    "Model": ("models.config", "models.pi05", "models.backbone", "models.gemma", "models.siglip", "models.keypoints"),
    "Heads": tuple(
        f"models.heads.{name}" for name in ("base", "flow", "subtask", "fast", "location", "token", "value")
    ),
    "Data": (
        *("data.datamodule", "data.mixture", "data.processor", "data.statistics", "data.augment"),
        *("data.tokenizer", "data.fast", "data.robot"),
        *("data.sources.base", "data.sources.lerobot", "data.sources.vision_text", "data.sources.language"),
    ),
    "Weights": (
        "weights.locate",
        "weights.base",
        "weights.abilities",
        "weights.folder",
        "weights.published",
        "weights.lerobot_folder",
    ),
    "Simulation": (
        *("sim.environment", "sim.rollout", "sim.trials", "sim.course", "sim.motion", "sim.summary", "sim.baselines"),
        *("sim.metaworld.environment", "sim.desk.environment", "sim.libero", "sim.lerobot_env"),
    ),
    "Serving": ("serving.server", "serving.client.connection", "serving.client.controller", "serving.wire"),
}
"""Pages of the reference, and the modules on each."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """The theme's own files, the repository's, and the pages that are made."""
    kept = Files([file for file in files if Path(file.src_dir or "") != Path(config.docs_dir)])
    for file in sorted({path for pattern in (*PAGES, *FILES) for path in ROOT.glob(pattern)}):
        kept.append(File(str(file.relative_to(ROOT)), str(ROOT), config.site_dir, config.use_directory_urls))
    for name, text in made_pages():
        kept.append(File.generated(config, name, content=text))
    return kept


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """The menu, in which a folder stands for its pages."""
    names = [str(path.relative_to(ROOT)) for path in sorted(ROOT.glob("experiments/*/README.md"))]
    commands = [command_file(command) for command in TRAINER_COMMANDS | COMMANDS]
    python = [f"{PYTHON_PAGES}{title.lower()}.md" for title in API]
    folders = {
        "experiments/": ["experiments/README.md", *names],
        COMMAND_PAGES: [f"{COMMAND_PAGES}index.md", *commands],
        PYTHON_PAGES: [f"{PYTHON_PAGES}index.md", *python],
    }
    for entry in config.nav or []:
        for title, place in entry.items():
            entry[title] = folders.get(place, place) if isinstance(place, str) else place
    return config


def on_page_markdown(markdown: str, **_: Any) -> str:
    """A page; what links to the notebook links to the page that is made of it."""
    return markdown.replace(f"{Path(TUTORIAL).name})", f"{Path(TUTORIAL).stem}.md)")


def made_pages() -> Iterator[tuple[str, str | bytes]]:
    """Names and what is in them."""
    yield from tutorial()
    commands = TRAINER_COMMANDS | COMMANDS
    rows = [(f"[`pi05 {command}`]({Path(command_file(command)).name})", about) for command, about in commands.items()]
    yield f"{COMMAND_PAGES}index.md", f"# Commands\n\n{markdown_table(('command', 'what it does'), rows)}"
    for command in commands:
        lines = run_page(command) if command in TRAINER_COMMANDS else command_page(command)
        yield command_file(command), "\n".join([f"# pi05 {command}", "", *lines])
    rows = [
        (f"[{title}]({title.lower()}.md)", ", ".join(f"`{name}`" for name in names)) for title, names in API.items()
    ]
    about = "Modules of `pi05_lightning`, by what they are for."
    yield f"{PYTHON_PAGES}index.md", f"# Python\n\n{about}\n\n{markdown_table(('page', 'modules'), rows)}"
    for title, modules in API.items():
        members = (f"::: pi05_lightning.{name}\n" for name in modules)
        yield f"{PYTHON_PAGES}{title.lower()}.md", "\n".join([f"# {title}", "", *members])


def tutorial() -> Iterator[tuple[str, str | bytes]]:
    """The tutorial, run anew in a folder of its own: its page and its images.

    Raises CellExecutionError where it fails.
    """
    notebook = nbformat.read(ROOT / TUTORIAL, as_version=4)
    with TemporaryDirectory() as folder:
        NotebookClient(notebook, timeout=300, resources={"metadata": {"path": folder}}).execute()
    for cell in notebook.cells:
        if cell.cell_type == "code":  # progress bars and the like
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    text, resources = MarkdownExporter().from_notebook_node(notebook)
    yield str(Path(TUTORIAL).with_suffix(".md")), text
    for name, image in resources["outputs"].items():
        yield str(Path(TUTORIAL).with_name(name)), image


# --- options of commands


def command_file(command: str) -> str:
    """The page of a command, which may be of two words: neither an address nor a link has a space."""
    return f"{COMMAND_PAGES}{command.replace(' ', '-')}.md"


def run_page(command: str) -> Iterator[str]:
    """The options of `pi05 fit`; of the others of its kind, what they have beside them."""
    yield from (f"{capital(TRAINER_COMMANDS[command])}.", "", "```sh", *of_commands.EXAMPLES[command], "```", "")
    groups = {name: group for name, group in GROUPS.items() if name != "acting"}
    if command != "fit":
        yield "It takes the options of [pi05 fit](fit.md), where a checkpoint's own configuration is the default."
        groups = {"acting": GROUPS["acting"]} if command == "predict" else {}
    else:
        yield from ("Every option may stand in a file or be a flag.", "", "## Run", "")
        for name, text in of_commands.OF_THE_PARSER.items():
            yield from definition(name, "", text)
        for name, (_, text) in of_commands.RUN_OPTIONS.items():
            yield from definition(f"--{name}", "", text)
    for name, group in groups.items():
        yield from ("", f"## {group.title}", "")
        yield from described(name, of_commands.group_options(name))


def command_page(command: str) -> Iterator[str]:
    function = of_commands.function_of(command)
    yield from (f"{sentence(function.doc)}.", "", "## Options", "")
    yield from described("", of_commands.command_options(function))


def described(key: str, options: Iterable[Option]) -> Iterator[str]:
    """Every option of a group, and in sections of their own those of the classes that they are."""
    below: list[tuple[str, Found]] = []
    for option in options:
        name = of_commands.below(key, option.name)
        given = option.default is None and not option.keyword and not key
        yield from definition(option.name if given else f"--{name}", facts(option), option.text)
        for kind in of_commands.own_types(option):
            inner = option.inside(name)
            if kind.is_abstract:
                below += [(f"{inner}.init_args", of) for of in subclasses(kind)]
            else:
                below.append((inner, kind))
    for inner, kind in below:
        yield from ("", f"### {inner}: {kind.name}", "", f"{escaped(kind.summary)}." if kind.summary else "", "")
        yield from described(inner, options_of(kind))


def facts(option: Option) -> str:
    kind = option.kind.replace("None", "null")
    if option.default == "":
        return f"`{kind}`"
    return f"`{kind}`, {'required' if option.default is None else f'default `{option.default}`'}"


def definition(name: str, kind: str, text: str) -> Iterator[str]:
    yield from (f"`{name}`{'&emsp;' if kind else ''}{kind}", f":   {capital(escaped(text)) or '–'}", "")


def escaped(text: str) -> str:
    """A plain text as Markdown, its code left as it is."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(part if part.startswith("`") else re.sub(r"([*_<\[\]])", r"\\\1", part) for part in parts)


def capital(text: str) -> str:
    return text[:1].upper() + text[1:]
