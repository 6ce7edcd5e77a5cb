"""Opens pages in headless Chromium: what loads, what fails, and what it looks like."""

from __future__ import annotations

import argparse
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path

from playwright.sync_api import ConsoleMessage, Request, sync_playwright

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
  return {
    images: [...document.images].map(i => [i.alt, i.naturalWidth > 0]),
    videos: [...document.querySelectorAll("video")].map(v => v.videoWidth > 0),
    played: await Promise.all(play),
    width: document.documentElement.scrollWidth,
    text: text(document.body),
  };
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


def visit(
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
    Raises RuntimeError where there is no Chromium, playwright's Error where it does not start.
    """
    browser = find_browser()
    if browser is None:
        raise RuntimeError("there is no Chromium or Chrome on this machine: on Debian and Ubuntu, apt install chromium")
    options = ["--disable-gpu", "--disable-dev-shm-usage", "--autoplay-policy=no-user-gesture-required"]
    visited = Visit()

    def on_console(message: ConsoleMessage) -> None:
        if message.type in ("error", "assert"):
            visited.errors.append(f"{message.text} {message.location['url']}")

    def on_request(request: Request) -> None:
        if not request.url.startswith("data:") and request.url != address:
            visited.requests.append(request.url)

    with sync_playwright() as playwright, playwright.chromium.launch(executable_path=browser, args=options) as chromium:
        page = chromium.new_page(viewport={"width": width, "height": height})
        page.on("pageerror", lambda error: visited.errors.append(str(error)))
        page.on("console", on_console)
        page.on("request", on_request)
        page.goto(address, timeout=120_000)
        page.wait_for_timeout(1000 * seconds)
        for key, value in page.evaluate(MEDIA).items():
            setattr(visited, key, value)
        if screenshot is not None:
            page.screenshot(path=screenshot, full_page=full)
        if pdf is not None:
            page.pdf(path=pdf, print_background=True, prefer_css_page_size=True)
    return visited


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
    found = visit(address, given.screenshot, given.pdf, given.width, given.height, not given.top, given.seconds)
    broken = [alt for alt, there in found.images if not there]
    print(
        f"{len(found.images)} images, {len(broken)} broken {broken}; {len(found.videos)} videos,"
        f" {found.videos.count(False)} broken, {found.played.count(True)} played; requests: {found.requests}"
    )
    print("\n".join(f"error: {error}" for error in found.errors) or "no console errors")
    return bool(broken or found.errors or not all(found.videos) or not all(found.played))


if __name__ == "__main__":
    sys.exit(main())
