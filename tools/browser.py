"""Opens pages in headless Chromium over its DevTools protocol: what loads, what fails, and what it looks like."""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import shutil
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
# What every image, video and poster of a page came to. A video counts when it is decoded: its size is known then.
MEDIA = """
(async () => {
  const wait = [...document.images].map(i => { i.loading = "eager"; return i.decode().catch(() => 0); });
  for (const v of document.querySelectorAll("video")) {
    v.preload = "auto"; v.load();
    wait.push(new Promise(done => {
      if (v.readyState >= 2) done();
      v.onloadeddata = v.onerror = done;
      setTimeout(done, 10000);
    }));
  }
  await Promise.all(wait);
  const play = [...document.querySelectorAll("video")].map(async v => {
    v.muted = true;
    try { await v.play(); } catch (e) { return false; }
    const before = v.currentTime;
    for (let i = 0; i < 200 && v.currentTime === before && !v.ended; i++) {
      await new Promise(done => setTimeout(done, 50));
    }
    const played = v.currentTime > before || v.ended;
    v.pause(); v.currentTime = 0;
    return played;
  });
  // TensorBoard's custom elements keep what they show in shadow trees of their own
  const text = root => [
    ...[...root.children].map(e => e.innerText || ""),
    ...[...root.querySelectorAll("*")].filter(e => e.shadowRoot).map(e => text(e.shadowRoot)),
  ].join("\\n");
  return JSON.stringify({
    images: [...document.images].map(i => [i.alt, i.naturalWidth > 0]),
    videos: [...document.querySelectorAll("video")].map(v => v.videoWidth > 0),
    played: await Promise.all(play),
    width: document.documentElement.scrollWidth,
    text: text(document.body),
  });
})()
"""


@dataclass
class Visit:
    """What a visit to a page showed."""

    errors: list[str] = field(default_factory=list)
    """Exceptions, messages of the console at level error, and requests that failed."""
    requests: list[str] = field(default_factory=list)
    """Addresses that were asked for beside the page's own, `data:` left out."""
    images: list[tuple[str, bool]] = field(default_factory=list)
    """Each image's alt text, and whether it is there."""
    videos: list[bool] = field(default_factory=list)
    played: list[bool] = field(default_factory=list)
    width: int = 0
    """Of the whole page: more than the screen's where one would have to scroll sideways."""
    text: str = ""


def find_browser() -> str | None:
    """Chromium or Chrome on this machine, or None."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


async def visit(
    address: str,
    screenshot: Path | None = None,
    pdf: Path | None = None,
    width: int = 1280,
    height: int = 800,
    full: bool = True,
    seconds: float = 0,
) -> Visit:
    """Open an address and look at it, `seconds` after it has loaded.

    screenshot, pdf: where to save what it looks like, on a screen and printed.  full: down to the page's end.
    Raises RuntimeError where there is no Chromium, or where it does not start.
    """
    browser = find_browser()
    if browser is None:
        raise RuntimeError("there is no Chromium or Chrome on this machine: on Debian and Ubuntu, apt install chromium")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"]
        process = await asyncio.create_subprocess_exec(
            browser,
            *options,
            "--autoplay-policy=no-user-gesture-required",
            "--remote-debugging-port=0",
            f"--user-data-dir={profile}",
            "about:blank",
            stderr=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.DEVNULL,
        )
        try:
            socket = await asyncio.wait_for(_devtools_address(process), timeout=60)
            async with aiohttp.ClientSession() as session:
                return await _look(session, socket, address, screenshot, pdf, width, height, full, seconds)
        finally:
            process.terminate()
            await process.wait()


async def _devtools_address(process: asyncio.subprocess.Process) -> str:
    assert process.stderr is not None
    said = []
    async for line in process.stderr:
        said.append(line.decode(errors="replace"))
        if "DevTools listening on " in said[-1]:
            return said[-1].split("DevTools listening on ")[1].strip()
    raise RuntimeError("Chromium did not start:\n" + "".join(said))


class Tab:
    """One page of a running Chromium: commands with their results, and events as they come."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse, visited: Visit, address: str) -> None:
        self.socket, self.visited, self.address = socket, visited, address
        self.waiting: dict[int, asyncio.Future[Any]] = {}
        self.loaded = asyncio.Event()
        self.reader = asyncio.ensure_future(self._read())
        self.number = 0

    async def send(self, method: str, **params: Any) -> Any:
        self.number += 1
        self.waiting[self.number] = asyncio.get_running_loop().create_future()
        await self.socket.send_json({"id": self.number, "method": method, "params": params})
        answer = await asyncio.wait_for(self.waiting[self.number], timeout=120)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']['message']}")
        return answer["result"]

    async def _read(self) -> None:
        async for message in self.socket:
            content = json.loads(message.data)
            if "id" in content:
                self.waiting.pop(content["id"]).set_result(content)
            else:
                self._on_event(content["method"], content["params"])

    def _on_event(self, name: str, params: dict[str, Any]) -> None:
        if name == "Page.loadEventFired":
            self.loaded.set()
        elif name == "Runtime.exceptionThrown":
            details = params["exceptionDetails"]
            self.visited.errors.append(details.get("exception", {}).get("description") or details["text"])
        elif name == "Runtime.consoleAPICalled" and params["type"] in ("error", "assert"):
            self.visited.errors.append(" ".join(str(a.get("value", a.get("description"))) for a in params["args"]))
        elif name == "Log.entryAdded" and params["entry"]["level"] == "error":
            self.visited.errors.append(f"{params['entry']['text']} {params['entry'].get('url', '')}")
        elif name == "Network.requestWillBeSent":
            address = params["request"]["url"]
            if not address.startswith("data:") and address != self.address:
                self.visited.requests.append(address)


async def _look(
    session: aiohttp.ClientSession,
    address_of_browser: str,
    address: str,
    screenshot: Path | None,
    pdf: Path | None,
    width: int,
    height: int,
    full: bool,
    seconds: float,
) -> Visit:
    http = address_of_browser.replace("ws://", "http://").split("/devtools")[0]
    async with session.get(f"{http}/json/list") as answer:
        pages = [target for target in await answer.json() if target["type"] == "page"]
    visited = Visit()
    async with session.ws_connect(pages[0]["webSocketDebuggerUrl"], max_msg_size=0) as socket:
        tab = Tab(socket, visited, address)
        for domain in ("Page", "Runtime", "Log", "Network"):
            await tab.send(f"{domain}.enable")
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        await tab.send("Emulation.setDeviceMetricsOverride", **size)
        await tab.send("Page.navigate", url=address)
        await asyncio.wait_for(tab.loaded.wait(), timeout=120)
        await asyncio.sleep(seconds)
        result = await tab.send("Runtime.evaluate", expression=MEDIA, awaitPromise=True, returnByValue=True)
        for key, value in json.loads(result["result"]["value"]).items():
            setattr(visited, key, value)
        if screenshot is not None:
            picture = await tab.send(
                "Page.captureScreenshot",
                format="png",
                captureBeyondViewport=full,
                **_clip(await tab.send("Page.getLayoutMetrics")) if full else {},
            )
            screenshot.write_bytes(base64.b64decode(picture["data"]))
        if pdf is not None:
            printed = await tab.send("Page.printToPDF", printBackground=True, preferCSSPageSize=True)
            pdf.write_bytes(base64.b64decode(printed["data"]))
        tab.reader.cancel()
    return visited


def _clip(layout: dict[str, Any]) -> dict[str, Any]:
    size = layout["cssContentSize"]
    return {"clip": {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}}


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Open a page in headless Chromium; exit with 1 when anything on it is broken."
    )
    parser.add_argument("page", help="a file or an address")
    parser.add_argument("--screenshot", type=Path)
    parser.add_argument("--pdf", type=Path)
    parser.add_argument("--width", type=int, default=1280)
    parser.add_argument("--height", type=int, default=800)
    parser.add_argument("--top", action="store_true", help="the screenshot shows the first screen alone")
    parser.add_argument("--seconds", type=float, default=0, help="to wait after loading")
    given = parser.parse_args()
    address = given.page if "://" in given.page else Path(given.page).resolve().as_uri()
    found = asyncio.run(
        visit(address, given.screenshot, given.pdf, given.width, given.height, not given.top, given.seconds)
    )
    broken = [alt for alt, there in found.images if not there]
    print(
        f"{len(found.images)} images, {len(broken)} broken {broken}; {len(found.videos)} videos,"
        f" {found.videos.count(False)} broken, {found.played.count(True)} played; requests: {found.requests}"
    )
    print("\n".join(f"error: {error}" for error in found.errors) or "no console errors")
    return bool(broken or found.errors or not all(found.videos) or not all(found.played))


if __name__ == "__main__":
    sys.exit(main())
