"""A headless Chromium, where the machine has one: what a page looks like to it."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")

# A window cannot be as narrow as a phone, a frame can; its own viewport decides the media queries.
_FRAME = """<!DOCTYPE html><meta charset="utf-8">
<body style="margin: 0"><iframe id="page" srcdoc="{page}" style="border: 0; display: block;
width: {width}px; height: {height}px"></iframe><pre id="found"></pre>
<script>
addEventListener("load", async () => {{
  const inside = document.getElementById("page").contentDocument;
  inside.querySelectorAll("details").forEach(x => {{ x.open = true; }});
  await Promise.all([...inside.images].map(image => image.decode().catch(() => null)));
  const root = inside.documentElement;
  const name = x => x.tagName.toLowerCase() + (x.className ? "." + x.className : "");
  const hidden = x => x.closest(".wide") && !x.matches(".wide");
  document.getElementById("found").textContent = JSON.stringify({{
    width: root.clientWidth,
    scrolled: Math.max(root.scrollWidth, inside.body.scrollWidth),
    wider: [...inside.body.querySelectorAll("*")].filter(
      x => !hidden(x) && x.getBoundingClientRect().right > root.clientWidth + 0.5).map(name),
    scrolling: [...inside.querySelectorAll(".wide")].filter(
      x => x.scrollWidth > x.clientWidth).length,
    tables: inside.querySelectorAll("table").length,
    images: [...inside.images].map(x => [x.complete && x.naturalWidth > 0, x.alt, x.width]),
    ink: getComputedStyle(inside.body).color,
    paper: getComputedStyle(inside.body).backgroundColor,
    headings: [...inside.querySelectorAll("h1, h2, h3")].map(x => x.textContent),
  }});
}});
</script>
"""


def chromium() -> str:
    """Path of the browser; skips the test where there is none."""
    found = next((path for name in _NAMES if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(f"no headless browser here: none of {', '.join(_NAMES)} is on the path")
    return found


def measured(page: Path, folder: Path, *, width: int, dark: bool = False) -> dict[str, Any]:
    """What a browser finds on a page of a width in CSS pixels."""
    frame = folder / "frame.html"
    text = page.read_text(encoding="utf-8")
    frame.write_text(_FRAME.format(page=html.escape(text), width=width, height=844), "utf-8")
    command = [
        chromium(), "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
        "--no-first-run", f"--user-data-dir={folder / 'profile'}", "--window-size=1200,900",
        "--virtual-time-budget=20000", "--dump-dom",
        f"--blink-settings=preferredColorScheme={0 if dark else 1}", frame.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    found = re.search(r'<pre id="found">(.+?)</pre>', done.stdout, re.DOTALL)
    assert found, done.stderr[-2000:]
    content: dict[str, Any] = json.loads(html.unescape(found[1]))
    return content
