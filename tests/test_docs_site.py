"""The documentation's site: what is made from the source is whole, and it is fit to be read on a laptop and a phone."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType
from urllib.request import urlopen

import pytest
from playwright.sync_api import Page, expect, sync_playwright

from pi05_lightning.cli.help import function_of, group_options
from pi05_lightning.cli.layers import GROUPS
from pi05_lightning.cli.main import COMMANDS, TRAINER_COMMANDS
from pi05_lightning.cli.signatures import options_of

ROOT = Path(__file__).parents[1]
pytest.importorskip("mkdocs", reason="needs the extra docs")


def tool(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


docs_site, browser = tool("docs_site"), tool("browser")


def test_page_of_fit_has_every_option_of_every_group() -> None:
    page = "\n".join(docs_site.run_page("fit"))
    for group in GROUPS.keys() - {"acting"}:
        missing = [option.name for option in group_options(group) if f"`--{group}.{option.name}`" not in page]
        assert missing == []
    assert "`--data.sources.NAME.init_args.action_keys`" in page
    assert "`--model.config.vision.image_size`" in page


@pytest.mark.parametrize("command", COMMANDS)
def test_page_of_a_command_has_every_option(command: str) -> None:
    page = "\n".join(docs_site.command_page(command))
    options = options_of(function_of(command))
    if len(options) == 1 and options[0].types:
        options = options_of(options[0].types[0])
    missing = [o.name for o in options if f"`--{o.name}`" not in page and f"\n`{o.name}`" not in page]
    assert missing == []


def test_readme_and_menu_name_every_page_of_the_guide() -> None:
    pages = sorted(path.name for path in (ROOT / "docs").glob("*.md"))
    for file in ("README.md", "mkdocs.yml"):
        text = (ROOT / file).read_text(encoding="utf-8")
        assert [name for name in pages if f"docs/{name}" not in text] == []


def test_tutorials_head_is_the_one_of_the_guide() -> None:
    guide = (ROOT / "docs" / "add-a-loss.md").read_text(encoding="utf-8")
    head = re.search(r"```python\n# my_heads.py\n(.*?)\n```", guide, re.DOTALL)
    assert head is not None
    cells = json.loads((ROOT / docs_site.TUTORIAL).read_text(encoding="utf-8"))["cells"]
    sources = ["".join(cell["source"]) for cell in cells]
    assert [source for source in sources if source.endswith(head[1].partition("class GripperTargets")[2])]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of the built site."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "-q", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.mark.slow
@pytest.mark.skipif(browser.find_browser() is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("page", ["", "docs/tutorial/", "reference/commands/fit/", "reference/python/policy/"])
def test_pages_open_without_errors_and_fit_the_screen(site: str, page: str, width: int) -> None:
    visited = browser.visit(site + page, width=width, seconds=1)
    assert visited.errors == []
    assert all(there for _, there in visited.images)
    assert [address for address in visited.requests if not address.startswith(site)] == []
    assert visited.width == width


@pytest.fixture
def laptop(site: str) -> Iterator[Page]:
    """The site's first page, as somebody sees it whose laptop is set to light."""
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=browser.find_browser(), args=["--no-sandbox"])
        page = chromium.new_page(viewport={"width": 1280, "height": 800}, color_scheme="light")
        page.goto(site)
        yield page
        chromium.close()


@pytest.mark.slow
@pytest.mark.skipif(browser.find_browser() is None, reason="no Chromium on this machine")
def test_search_finds_a_page_and_goes_there(laptop: Page) -> None:
    laptop.get_by_role("textbox", name="Search").click()
    laptop.keyboard.type("horizon_seconds")
    found = laptop.locator(".md-search-result__link", has_text="fit").first
    found.click()
    expect(laptop.locator("article")).to_contain_text("horizon_seconds")


@pytest.mark.slow
@pytest.mark.skipif(browser.find_browser() is None, reason="no Chromium on this machine")
def test_site_is_light_or_dark_as_asked(laptop: Page) -> None:
    def darkness() -> float:
        colour = laptop.evaluate("getComputedStyle(document.body).backgroundColor")
        return 1 - sum(map(int, re.findall(r"\d+", colour)[:3])) / 3 / 255

    assert darkness() < 0.1
    laptop.locator("label[title=Dark]").click()
    expect(laptop.locator("body")).to_have_attribute("data-md-color-scheme", "slate")
    assert darkness() > 0.8
    laptop.reload()
    expect(laptop.locator("body")).to_have_attribute("data-md-color-scheme", "slate")


@pytest.mark.slow
def test_every_command_and_experiment_has_a_page(site: str) -> None:
    commands = [f"{command.replace(' ', '-')}/" for command in TRAINER_COMMANDS | COMMANDS]
    with urlopen(f"{site}reference/commands/") as answer:
        listed = answer.read().decode()
    assert [command for command in commands if f'href="{command}"' not in listed] == []
    pages = [f"reference/commands/{command}" for command in commands]
    pages += [f"experiments/{readme.parent.name}/" for readme in (ROOT / "experiments").glob("0*/README.md")]
    for page in pages:
        with urlopen(site + page) as answer:  # raises where there is none
            assert answer.status == 200
