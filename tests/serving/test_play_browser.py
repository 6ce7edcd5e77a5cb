"""The page in headless Chromium, with a real policy in a real simulator; skipped where there is no Chromium."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Browser, Page, ViewportSize, WebSocketRoute, expect, sync_playwright

from pi05_lightning.serving.play import PAGE
from tests.serving.processes import PATIENCE, Process, served_by_process
from tests.sim.conftest import config
from tests.untrained import untrained_policy

NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next((path for name in NAMES if (path := shutil.which(name))), None)
LAPTOP: ViewportSize = {"width": 1280, "height": 800}
PHONE: ViewportSize = {"width": 390, "height": 844}

pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium or Chrome on this machine (Debian, Ubuntu: apt install chromium)"
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy of random weights, for MetaWorld's arm."""
    from pi05_lightning.sim.demonstrations.collect import collect

    folder = tmp_path_factory.mktemp("played")
    collect(config(folder / "data"))
    return untrained_policy(folder, folder / "data" / "robot")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    expect.set_options(timeout=1000 * PATIENCE)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture
def visited(browser: Browser) -> Iterator[Page]:
    """A page of a laptop's size, on which no script failed."""
    page = browser.new_page(viewport=LAPTOP)
    page.set_default_timeout(1000 * PATIENCE)
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    yield page
    page.close()
    assert errors == []


def picture(page: Page, place: int = 0) -> np.ndarray:
    """The scene as it is shown, u8[h w 3]."""
    source = page.locator(".picture").nth(place).get_attribute("src")
    assert source is not None
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))))


def difference(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(one.astype(float) - other).mean())


def text(page: Page, selector: str) -> str:
    return page.locator(selector).first.inner_text()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_what_is_typed_and_clicked_is_done_and_seen(checkpoint: Path, visited: Page) -> None:
    with served_by_process(checkpoint, "--max_state_distance=null", command="play") as server:
        visited.goto(f"http://{server.address}")
        expect(visited.locator("#link")).to_have_text("connected")
        expect(visited.locator(".badge")).to_have_text("paused")
        assert text(visited, ".judged") == "drawer-open-v3"
        start = picture(visited)
        assert start.shape == (384, 384, 3)
        assert start.std() > 20
        visited.locator("#instruction").fill("wave at the camera")
        visited.locator("#tell button").click()
        expect(visited.locator(".told")).to_have_text("wave at the camera")
        expect(visited.locator(".badge")).to_have_text("acting")
        expect(visited.locator(".time")).to_have_text(re.compile(r"^[1-9]\.\d of 6\.0 s"))
        visited.locator("#pause").click()
        expect(visited.locator(".badge")).to_have_text("paused")
        moved = picture(visited)
        assert difference(start, moved) > 0.3
        assert visited.locator(".chunk polyline").count() == 8
        assert re.fullmatch(r"[\d.]+ ms a decision", text(visited, ".policy"))
        visited.locator("#question").fill("where is the drawer?")
        visited.locator("#ask button").click()
        expect(visited.locator(".answers figure")).to_have_count(2)
        visited.get_by_role("button", name="left").click()
        visited.wait_for_function("source => document.querySelector('.picture').src !== source", arg=source_of(visited))
        assert difference(moved, picture(visited)) > 0.3
        visited.locator("#number").fill("2")
        visited.locator("#reset button").click()
        expect(visited.locator(".time")).to_have_text("0.0 of 6.0 s")
        other = picture(visited)
        visited.locator("#number").fill("0")
        visited.locator("#reset button").click()
        visited.wait_for_function("source => document.querySelector('.picture').src !== source", arg=source_of(visited))
        assert difference(start, picture(visited)) < 0.1 < difference(start, other)
        visited.get_by_role("button", name="reach the red ball").click()
        expect(visited.locator(".judged").first).to_have_text("reach-v3")
        visited.locator("#number").fill("99")
        visited.evaluate("document.querySelector('#number').max = ''")
        visited.locator("#reset button").click()
        expect(visited.locator("#notice")).to_contain_text("numbered from 0 to 24, not 99")


def play_in_the_room(policy: Path) -> AbstractContextManager[Process]:
    """Its cameras are not square, and of one task it does not say beforehand what is told."""
    options = ("--env", "room.Room", "--env.unsaid", "deep", "--max_state_distance=null")
    return served_by_process(policy, *options, command="play", PYTHONPATH=str(Path(__file__).parent))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_again_begins_what_is_shown_and_what_is_wrong_with_it_stays_to_be_read(served: Path, visited: Page) -> None:
    with play_in_the_room(served) as server:
        visited.goto(f"http://{server.address}")
        visited.get_by_role("button", name="deep").click()
        expect(visited.locator(".judged")).to_have_text("deep")
        expect(visited.locator(".told")).to_have_text("go down")
        visited.locator("#instruction").fill("wander about")
        visited.locator("#tell button").first.click()
        expect(visited.locator(".told")).to_have_text("wander about")
        visited.get_by_role("button", name="deep").click()
        expect(visited.locator(".told")).to_have_text("go down")
        visited.locator("#number").fill("2")
        visited.get_by_role("button", name="max").click()
        visited.get_by_role("button", name="go to the left").click()
        expect(visited.locator("#pause")).to_have_text("Again")
        expect(visited.locator("#task")).to_have_value("left")
        expect(visited.locator("#number")).to_have_value("0")
        visited.locator("#number").fill("99")
        visited.locator("#pause").click()  # the page itself says that this is too much
        visited.wait_for_timeout(500)
        expect(visited.locator("#pause")).to_have_text("Again")
        expect(visited.locator("#notice")).to_be_hidden()
        visited.evaluate("document.querySelector('#number').max = ''")
        visited.locator("#pause").click()
        expect(visited.locator("#notice")).to_contain_text("numbered from 0 to 24, not 99")
        visited.wait_for_timeout(500)
        expect(visited.locator("#notice")).to_contain_text("numbered from 0 to 24, not 99")
        visited.locator("#number").fill("1")
        visited.get_by_role("button", name="¼×").click()
        visited.locator("#pause").click()
        expect(visited.locator(".badge")).to_have_text("acting")
        expect(visited.locator(".judged")).to_have_text("left")
        expect(visited.locator("#notice")).to_be_hidden()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_space_bar_pauses_wherever_nothing_is_typed(served: Path, visited: Page) -> None:
    with play_in_the_room(served) as server:
        visited.goto(f"http://{server.address}")
        visited.get_by_role("button", name="¼×").click()
        visited.get_by_role("button", name="go to the right").click()
        expect(visited.locator(".badge")).to_have_text("acting")
        visited.keyboard.press("Space")
        expect(visited.locator(".badge")).to_have_text("paused")
        for _ in range(3):
            visited.keyboard.down("Space")  # held, after the first
        visited.keyboard.up("Space")
        expect(visited.locator(".badge")).to_have_text("acting")
        visited.locator("#question").fill("where")
        visited.keyboard.press("Space")
        expect(visited.locator("#question")).to_have_value("where ")
        visited.wait_for_timeout(300)
        expect(visited.locator(".badge")).to_have_text("acting")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_pictures_keep_their_shape(served: Path, visited: Page) -> None:
    with play_in_the_room(served) as server:
        visited.goto(f"http://{server.address}")
        for selector in (".picture", ".seen img"):
            fit = "element => getComputedStyle(element).objectFit"
            assert visited.locator(selector).first.evaluate(fit) == "contain"
        visited.locator("#question").fill("where is the door?")
        visited.locator("#ask button").click()
        expect(visited.locator(".answers figure")).to_have_count(2)
        shown = visited.locator(".answers .shown").first.bounding_box()
        assert shown is not None
        assert shown["width"] / shown["height"] == pytest.approx(64 / 48, rel=0.02)  # boxes are shares of it


def test_why_nothing_is_shown_stays_to_be_read_until_it_is_shown_again(visited: Page) -> None:
    scene = {"tasks": {}, "states": 1, "simulator": "Room", "ways": [], "speeds": [1]}
    state = {"paused": True, "speed": 1, "players": []}
    sockets: list[WebSocketRoute] = []

    def hear(said: str | bytes) -> None:
        sockets[0].send(json.dumps({"error": "no"} if json.loads(said)["do"] == "ask" else {"done": ""}))

    def answer(socket: WebSocketRoute) -> None:
        sockets.append(socket)
        socket.on_message(hear)
        for said in ({"scene": scene}, {"state": state}, {"unshown": "no renderer"}):
            socket.send(json.dumps(said))

    visited.route("**/page/*", lambda route: route.fulfill(path=PAGE / Path(route.request.url).name))
    visited.route("http://page/", lambda route: route.fulfill(path=PAGE / "index.html"))
    visited.route_web_socket("ws://page/play", answer)
    visited.goto("http://page/")
    notice = visited.locator("#notice")
    expect(notice).to_have_text("no renderer")
    visited.get_by_role("button", name="1×").click()
    expect(notice).to_have_text("no renderer")
    visited.locator("#question").fill("where?")
    visited.locator("#ask button").click()
    expect(notice).to_have_text("no renderer; no")
    sockets[0].send(json.dumps({"state": state}))
    expect(notice).to_have_text("no")


def source_of(page: Page) -> str | None:
    return page.locator(".picture").first.get_attribute("src")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_policies_are_shown_side_by_side_at_a_laptops_and_a_phones_width(
    checkpoint: Path, visited: Page, browser: Browser
) -> None:
    options = ("--beside", str(checkpoint), "--env", "Desk", "--max_state_distance=null")
    with served_by_process(checkpoint, *options, command="play") as server:
        visited.goto(f"http://{server.address}")
        expect(visited.locator(".player")).to_have_count(2)
        with browser.new_page(viewport=PHONE) as phone:
            phone.goto(f"http://{server.address}")
            expect(phone.locator(".player")).to_have_count(2)
            phone.get_by_role("button", name="open the drawer").click()
        expect(visited.locator(".badge").first).to_have_text("acting")  # its page is closed, and the robot goes on
        for size in (LAPTOP, PHONE):
            visited.set_viewport_size(size)
            assert visited.evaluate("document.documentElement.scrollWidth") <= size["width"]
        lefts = [visited.locator(".player").nth(place).bounding_box() for place in (0, 1)]
        assert lefts[0] is not None
        assert lefts[1] is not None
        assert lefts[0]["x"] == lefts[1]["x"]  # one below the other
