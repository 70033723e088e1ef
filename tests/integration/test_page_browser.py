"""The page of a pruned model in a real browser."""

import re
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest
from helpers.chromium import ask, needs_chromium
from helpers.reports import evaluation, made_up, pruned_llama

from wandazeta.pruning.report.page import write_page

pytestmark = [pytest.mark.slow, needs_chromium]

# size of each picture, how much is drawn, and how many words lie outside
PICTURES = """[...document.querySelectorAll("svg")].map((svg) => {
  const box = svg.getBoundingClientRect();
  const texts = [...svg.querySelectorAll("text")].map((text) => text.getBoundingClientRect());
  return [box.width, box.height, svg.querySelectorAll("path").length,
    texts.filter((t) => t.left < box.left - 1 || t.right > box.right + 1 || t.bottom > box.bottom + 1).length];
})"""
SEEN = f"""{{
  width: innerWidth, content: document.documentElement.scrollWidth, fetched: performance.getEntriesByType("resource"),
  background: getComputedStyle(document.body).backgroundColor, color: getComputedStyle(document.body).color,
  bar: getComputedStyle(document.querySelector("svg path[style*=accent]")).fill,
  rows: document.querySelectorAll("#layers + .table tbody tr").length,
  cut: [...document.querySelectorAll(".scroll, .table, .card")].filter((e) => e.scrollWidth > e.clientWidth + 1).length,
  pictures: {PICTURES}
}}"""


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "page.html"
    measured = evaluation("word" * 100, dense=20.1, a_name_that_is_as_long_as_a_name_may_be=59.0)
    write_page(pruned_llama(), path, evaluation=measured, model="a/b")
    return path.read_text(encoding="utf-8")


def brightness(color):
    return sum(map(int, re.findall(r"\d+", color)[:3])) / 765


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (400, True)])
def test_the_page_is_shown_whole_and_nothing_is_fetched(page, width, dark):
    seen = ask(page, SEEN, width, dark)
    assert seen["width"] == width
    assert seen["content"] <= width
    assert seen["fetched"] == []
    assert (brightness(seen["background"]) < 0.2) == dark
    assert abs(brightness(seen["background"]) - brightness(seen["color"])) > 0.7
    assert len(set(re.findall(r"\d+", seen["bar"])[:3])) == 3  # the accent colour reached the pictures
    assert seen["rows"] == 6 * 7
    assert len(seen["pictures"]) == 6
    for picture_width, height, paths, outside in seen["pictures"]:
        assert picture_width > 100
        assert height > 50
        assert paths > 5
        assert outside == 0


def test_a_heading_sorts_the_table_by_numbers(tmp_path):
    write_page(made_up(12), tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    column = """(() => {
      const heading = [...document.querySelectorAll("thead th")].find((e) => e.textContent.trim() === "%s");
      for (let click = 0; click < %d; click++) heading.firstElementChild.click();
      const cells = [...document.querySelectorAll("tbody tr")].map((row) => row.cells[heading.cellIndex].textContent);
      return [heading.ariaSort, cells];
    })()"""
    direction, cells = ask(page, column % ("Sparsity", 1))
    values = [float(cell.rstrip("%")) for cell in cells]
    assert direction == "ascending"
    assert values == sorted(values)
    assert len(set(values)) == 10
    direction, cells = ask(page, column % ("Block", 2))
    assert direction == "descending"
    assert list(map(int, cells)) == sorted([*range(12)] * 2, reverse=True)


@pytest.mark.parametrize("has_policy", [True, False])
def test_the_policy_of_the_page_stops_what_should_not_be_there(page, has_policy):
    requests = []

    class Recorder(BaseHTTPRequestHandler):
        def do_GET(self):
            requests.append(self.path)
            self.send_error(404)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Recorder)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        page = page.replace("<main>", f'<main><img src="http://127.0.0.1:{server.server_port}/x.png">')
        ask(page if has_policy else re.sub(r"<meta http-equiv[^>]*>", "", page), "1")
    finally:
        server.shutdown()
        server.server_close()
    assert requests == ([] if has_policy else ["/x.png"])
