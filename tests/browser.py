"""A headless Chromium, for the tests of the report: what it shows, prints and complains of."""

import os
import re
import shutil
import subprocess
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
#: Set where a missing browser must fail the tests rather than skip them, as in `.ci/run`.
REQUIRED = "REQUIRE_BROWSER"
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--disable-dev-shm-usage", "--hide-scrollbars", "--host-resolver-rules=MAP * ~NOTFOUND",
    "--enable-logging=stderr", "--v=0",
)  # fmt: skip
SCREEN = (1280, 800)
#: In seconds: what only a browser that hangs reaches.
HANG = 180


def browser():
    """The path of a Chromium or Chrome; None without one."""
    return next(filter(None, map(shutil.which, NAMES)), None)


def missing_browser():
    """Why the tests of the browser are skipped; None where they must run."""
    return None if browser() or os.environ.get(REQUIRED) else "needs Chromium or Chrome"


def open_page(page, folder, *flags):
    """Open a page; return what the browser printed, and its lines from the page's console."""
    path = browser()
    assert path, f"no Chromium or Chrome on the PATH, and {REQUIRED} is set"
    profile = Path(folder) / "profile"
    done = subprocess.run(
        [path, *FLAGS, f"--user-data-dir={profile}", *flags, Path(page).as_uri()],
        capture_output=True, text=True, timeout=HANG, check=True,
    )  # fmt: skip
    shutil.rmtree(profile, ignore_errors=True)
    return done.stdout, re.findall(r"CONSOLE.*", done.stderr)


def screenshot(page, folder, *, dark=False):
    """The path of a picture of the first screen, and the lines from the console."""
    picture = Path(folder) / ("dark.png" if dark else "light.png")
    scheme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
    size = "--window-size={},{}".format(*SCREEN)
    _, console = open_page(page, folder, size, scheme, f"--screenshot={picture}")
    return picture, console


def pdf_pages(page, folder):
    """The number of A4 pages that the page is printed on."""
    file = Path(folder) / "page.pdf"
    open_page(page, folder, "--no-pdf-header-footer", f"--print-to-pdf={file}")
    (count,) = re.findall(rb"/Type /Pages\s*/Count (\d+)", file.read_bytes())
    return int(count)


def measured(page, folder, script):
    """What an expression of JavaScript gives in a copy of the page that allows scripts."""
    text = Path(page).read_text()
    text = re.sub(r"<meta http-equiv=[^>]*>", "", text, count=1)
    code = f"<script>onload = () => {{ document.title = 'found: ' + JSON.stringify({script}) }}"
    copy = Path(folder) / "measured.html"
    copy.write_text(text.replace("</body>", f"{code}</script></body>"))
    size = "--window-size={},{}".format(*SCREEN)
    dom, _ = open_page(copy, folder, size, "--virtual-time-budget=2000", "--dump-dom")
    return re.search(r"<title>found: (.*?)</title>", dom, re.DOTALL)[1]
