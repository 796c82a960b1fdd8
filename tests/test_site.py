"""The web site: built by one command, every link and anchor in it leads somewhere."""

import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from scripts import site
from scripts.cli import ROOT

PAGES = ("index", "CONTRIBUTING", "CHANGELOG", "data/README", "notebooks/llama3_dpo",
         "notebooks/preference_data")  # fmt: skip


class Links(HTMLParser):
    """The targets and the anchors of a page, and images without words."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.targets, self.anchors, self.wordless = [], set(), []
        self.feed(page.read_text())

    def handle_starttag(self, tag: str, attributes: list) -> None:
        values = dict(attributes)
        self.targets += [values[name] for name in ("href", "src") if values.get(name)]
        self.anchors |= {values[name] for name in ("id", "name") if values.get(name)}
        if tag == "img" and not values.get("alt"):
            self.wordless.append(values.get("src", "")[:40])


def dead_links(folder: Path) -> list[str]:
    """What is linked to inside the site and is not there: files and anchors."""
    pages = {page.resolve(): Links(page) for page in folder.rglob("*.html")}
    dead = []
    for page, links in pages.items():
        for target in links.targets:
            parts = urlsplit(target)
            if parts.scheme or parts.netloc:
                continue
            file = (page.parent / unquote(parts.path)).resolve() if parts.path else page
            if not file.exists():
                dead.append(f"{page.name}: {target}")
            elif file in pages and parts.fragment not in ("", *pages[file].anchors):
                dead.append(f"{page.name}: {target}: no such anchor")
    return dead


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("site") / "site"
    command = [sys.executable, "-m", "scripts.site", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(out / "index.html")
    return out


def test_every_link_and_anchor_leads_somewhere(built):
    assert all((built / f"{name}.html").is_file() for name in PAGES)
    found = Links(built / "index.html").targets
    assert "notebooks/llama3_dpo.html" in found and "#configs" in found
    assert dead_links(built) == []


def test_a_dead_link_would_be_seen(built, tmp_path):
    shutil.copytree(built, tmp_path / "site")
    page = tmp_path / "site" / "index.html"
    page.write_text(page.read_text() + '<a href="none.html"></a><a href="CHANGELOG.html#none"></a>')
    assert dead_links(tmp_path / "site") == [
        "index.html: none.html", "index.html: CHANGELOG.html#none: no such anchor",
    ]  # fmt: skip


def test_figures_have_words_and_equations_are_there(built):
    page = built / "notebooks" / "llama3_dpo.html"
    assert Links(page).wordless == []
    text = page.read_text()
    assert text.count("data:image/png;base64") >= 8
    assert r"\mathcal{L} = -\log\sigma" in text


@pytest.mark.parametrize("link", ["none.md", "#none", "CHANGELOG.md#none"])
def test_a_dead_link_in_a_source_fails_the_build(tmp_path, monkeypatch, link):
    gather = site._gather

    def gather_one_more(source: Path) -> None:
        gather(source)
        shutil.rmtree(source / "notebooks")
        (source / "index.md").write_text(f"# A page\n\n[dead]({link})\n")

    monkeypatch.setattr(site, "_gather", gather_one_more)
    with pytest.raises(site.SiteError, match="the site has faults"):
        site.build(tmp_path / "site")


def test_a_folder_with_something_else_is_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(site.SiteError, match="something else than a site"):
        site.build(tmp_path)
    assert (tmp_path / "mine.txt").exists()
