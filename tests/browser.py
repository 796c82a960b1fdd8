"""JupyterLab at the root of a copy of this repository, and Debian's Chromium to look at it."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import papermill
from papermill.iorw import load_notebook_node, write_ipynb
from playwright.sync_api import Browser, Page, sync_playwright

from scripts.base import ROOT

CHROMIUM = shutil.which("chromium")
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip
THEMES = ("JupyterLab Light", "JupyterLab Dark")


class Lab:
    """A running JupyterLab; `url(name)` opens a notebook in a workspace of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.root, self.token = folder, folder / "repository", secrets.token_hex(8)
        self._opened = 0
        command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
        names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        for name in names.splitlines():
            if (ROOT / name).is_file():
                (self.root / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / name, self.root / name)

    def set(self, plugin: str, **values: object) -> None:
        """Write settings as a user would in the settings editor."""
        path = self.folder / "settings" / "@jupyterlab" / f"{plugin}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values))

    def parameters(self, name: str, values: dict) -> None:
        """Put `values` into the copy of a notebook, as papermill does: a cell after the first."""
        path = str(self.root / "notebooks" / name)
        notebook = papermill.parameterize.parameterize_notebook(load_notebook_node(path), values)
        write_ipynb(notebook, path)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Start the server, on loopback, with a token, at the repository's root."""
        self.set("apputils-extension/notification", fetchNews="false", checkForUpdates=False)
        # Every cell is laid out, not only those in view.
        self.set("notebook-extension/tracker", windowingMode="none")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        places = {"SETTINGS": "LAB_SETTINGS", "WORKSPACES": "LAB_WORKSPACES", "RUNTIME": "_RUNTIME",
                  "CONFIG": "_CONFIG"}  # fmt: skip
        env = os.environ | {
            f"JUPYTER{name}_DIR": str(self.folder / place.lower()) for place, name in places.items()
        }
        command = [
            sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root",
            "--ServerApp.ip=127.0.0.1", f"--ServerApp.port={self.port}",
            f"--IdentityProvider.token={self.token}", "--expose-app-in-browser",
        ]  # fmt: skip
        with (self.folder / "lab.log").open("w") as log:
            server = subprocess.Popen(command, cwd=self.root, env=env, stdout=log, stderr=log)
        try:
            self._wait(server)
            yield
        finally:
            server.terminate()  # which ends its kernels, too
            try:
                server.wait(60)
            except subprocess.TimeoutExpired:  # a busy machine: its end is not what is tested
                server.kill()

    def _wait(self, server: subprocess.Popen, seconds: float = 300) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until and server.poll() is None:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/api", timeout=5)
                return
            except OSError:
                time.sleep(0.3)
        raise RuntimeError((self.folder / "lab.log").read_text()[-3000:])

    def open(self, browser: Browser, name: str, width: int, height: int = 1000) -> Page:
        """A page with the notebook, the file browser beside it folded away."""
        self._opened += 1
        page = browser.new_page(viewport={"width": width, "height": height})
        where = f"lab/workspaces/w{self._opened}/tree/notebooks/{name}?token={self.token}"
        page.goto(f"http://127.0.0.1:{self.port}/{where}")
        page.wait_for_function(
            "window.jupyterapp?.shell.currentWidget?.context?.isReady &&"
            " document.querySelector('.jp-Notebook .jp-Cell')", timeout=90_000,
        )  # fmt: skip
        page.evaluate("jupyterapp.shell.collapseLeft()")
        page.wait_for_function("!document.querySelector('.jp-Notebook .jp-mod-placeholder')")
        page.wait_for_timeout(1500)  # equations are set, figures decoded
        return page


@contextmanager
def chromium() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


# Everything in an output or a text that does not fit, cannot be read or has no words; a list.
LAYOUT = """() => {
  const found = [], notebook = document.querySelector('.jp-Notebook');
  const box = e => e.getBoundingClientRect();
  const say = (e, what) => {
    const cells = [...notebook.querySelectorAll('.jp-Cell')];
    found.push(`cell ${cells.indexOf(e.closest('.jp-Cell'))}: ${what}`);
  };
  for (const image of notebook.querySelectorAll('.jp-OutputArea-output img')) {
    if (!image.naturalWidth) say(image, 'a figure is not shown');
    // JupyterLab itself writes "Image" where a page has nothing.
    if (['', 'Image'].includes(image.alt)) say(image, 'a figure has no alternative text');
    if (box(image).right > box(image.closest('.jp-OutputArea')).right + 1)
      say(image, 'a figure is wider than the page');
    const scale = box(image).width / image.naturalWidth;
    if (scale < 0.7) say(image, `a figure is shrunk to ${Math.round(100 * scale)}%`);
  }
  for (const formula of notebook.querySelectorAll('mjx-container')) {
    const inner = formula.querySelector('mjx-math');
    const limit = box(formula.closest('.jp-RenderedHTMLCommon')).right;
    if (box(inner).right > limit + 1)
      say(formula, `an equation is clipped by ${Math.round(box(inner).right - limit)} px`);
  }
  for (const error of notebook.querySelectorAll('mjx-merror')) say(error, 'an equation is wrong');
  for (const cell of notebook.querySelectorAll('.jp-OutputArea-output td')) {
    const aligned = getComputedStyle(cell).textAlign;
    if (cell.innerText.length > 60 && aligned != 'left' && aligned != 'start')
      say(cell, `text is aligned ${aligned}: ${cell.innerText.slice(0, 30)}`);
  }
  for (const area of notebook.querySelectorAll('.jp-OutputArea-output')) {
    const table = area.querySelector('table');
    if (!table && area.scrollWidth > area.clientWidth + 1)
      say(area, `an output is ${area.scrollWidth - area.clientWidth} px wider than the page`);
  }
  return found;
}"""


def screenshot(page: Page, path: Path) -> None:
    """The whole notebook as pictures of at most 3000 px each, `path-0.png` and so on."""
    size = page.viewport_size
    page.set_viewport_size({"width": size["width"], "height": 3000})
    page.wait_for_timeout(300)
    outer = ".jp-NotebookPanel:not(.lm-mod-hidden) .jp-WindowedPanel-outer"
    high, step = page.evaluate(
        f"(() => {{ const e = document.querySelector('{outer}');"
        " return [e.scrollHeight, e.clientHeight]; })()"
    )
    for number, top in enumerate(range(0, high, step)):
        page.evaluate(f"document.querySelector('{outer}').scrollTop = {top}")
        page.wait_for_timeout(300)
        page.screenshot(path=f"{path}-{number}.png")
    page.set_viewport_size(size)
