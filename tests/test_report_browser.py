"""A report in a real browser: sorted, filtered, copied, printed.

    pytest -m slow tests/test_report_browser.py       # a few seconds

Needs Chromium on this machine.
"""

import re
import shutil
import subprocess

import pytest
from test_report import make_sweep

from memjax.cli import main

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)
pytestmark = [pytest.mark.slow, pytest.mark.skipif(BROWSER is None, reason="needs Chromium")]
ACT = """<script>
addEventListener("load", () => {
  const taken = [];
  if (navigator.clipboard) navigator.clipboard.writeText = async text => { taken.push(text); };
  document.execCommand = () => taken.push(document.activeElement.value);
  const table = document.querySelectorAll("table")[1];
  [...table.querySelectorAll("th")].find(th => th.textContent === "loss").click();
  const filter = document.querySelector("input[type=search]");
  filter.value = "D_MODEL=64 ";
  filter.dispatchEvent(new Event("input"));
  document.querySelectorAll(".copy")[1].click();
  setTimeout(() => { document.body.innerHTML = "<pre>" + taken.join("!") + "</pre>"; }, 100);
});
</script></body>"""


def browse(page, *arguments):
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", *arguments]
    done = subprocess.run([*command, page.as_uri()], capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode()


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report") / "sweep"
    make_sweep(folder, 24, failed=(5,))
    assert main(["report", str(folder)]) == 0
    return folder / "report" / "report.html"


def test_rows_that_are_sorted_and_filtered_are_copied_with_full_numbers(page):
    acting = page.with_name("acting.html")
    acting.write_text(page.read_text().replace("</body>", ACT))
    shown = browse(acting, "--virtual-time-budget=3000", "--dump-dom")
    head, *rows = re.search(r"<pre>(.*?)</pre>", shown, re.S)[1].strip().splitlines()
    rows = [dict(zip(head.split("\t"), row.split("\t"))) for row in rows]
    assert len(rows) == 12 and {row["d_model"] for row in rows} == {"64"}
    losses = [float(row["loss"]) for row in rows]
    assert losses == sorted(losses) and all(len(row["loss"]) > 8 for row in rows)


def test_a_report_is_printed_on_pages_of_paper_with_all_its_rows(page, tmp_path):
    paper = tmp_path / "report.pdf"
    browse(page, "--no-pdf-header-footer", f"--print-to-pdf={paper}")
    pages = re.findall(rb"/MediaBox \[0 0 ([\d.]+) ([\d.]+)\]", paper.read_bytes())
    assert pages and {tuple(round(float(side)) for side in size) for size in pages} == {(842, 595)}
