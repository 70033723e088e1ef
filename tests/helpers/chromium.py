"""Open a page in a real browser without a window and ask it what it sees."""

import html
import json
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

OPTIONS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    # the browser asks its maker for the time, updates and accounts all the same: let no name but this machine's resolve
    "--no-proxy-server",
    "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1",
]

needs_chromium = pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium; apt-get install chromium")


def in_frame(page, width, expression="null"):
    """A document with the page in a frame, since no window is as narrow as a phone; it ends up with the answer."""
    probe = f"<script>document.documentElement.dataset.answer = JSON.stringify({expression})</script>"
    page = html.escape(page.replace("</body>", f"{probe}</body>"))
    hand_on = "document.documentElement.dataset.answer = this.contentDocument.documentElement.dataset.answer"
    style = f"width: {width}px; height: 100vh; border: 0"
    return (
        '<!doctype html><html style="color-scheme: light dark"><meta charset="utf-8"><body style="margin: 0">'
        f'<iframe srcdoc="{page}" style="{style}" onload="{hand_on}"></iframe>'
    )


def ask(page, expression, width=1280, dark=False):
    """Evaluate an expression of JavaScript at the end of a page, shown at a width, and return its value."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "page.html")
        file.write_text(in_frame(page, width, expression), encoding="utf-8")
        command = ["chromium", *OPTIONS, f"--user-data-dir={folder}/profile", "--window-size=1400,900"]
        command += [f"--blink-settings=preferredColorScheme={int(not dark)}", "--dump-dom", file.as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    answer = re.search(r'<html[^>]* data-answer="([^"]*)"', done.stdout)
    assert answer, done.stderr[-2000:]
    return json.loads(html.unescape(answer[1]))
