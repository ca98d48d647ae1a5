"""The report's page and pictures: what is where, and in a browser that it fits and sorts."""
import html
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser

import pytest
from test_compare import write_run

from tools import compare, page, pictures
from tools.runs import read_run

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def write_runs(folder):
    """Three models with three seeds each, one run that has not finished and one under other conditions."""
    for seed in (1, 2, 3):
        noise = 0.01 * seed**2
        write_run(folder / f"a{seed}", losses=(5.5, 4.0, 3.0 + noise, 2.5 - noise), seed=seed, right=390)
        write_run(folder / f"b{seed}", losses=(5.5, 3.8, 2.9, 2.4 - noise), script="train_llama", seed=seed)
        write_run(folder / f"c{seed}", losses=(5.5, 3.9, 2.7, 2.1 - noise), n_layer=3, seed=seed)
    write_run(folder / "d", losses=(5.5, 3.9), script="train_mta", max_steps=30)
    write_run(folder / "e", losses=(5.5, 3.9, 3.0, 2.0), max_lr=1.0)
    return sorted(folder.iterdir())


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The folder of a report, and its Markdown."""
    folder = tmp_path_factory.mktemp("page")
    runs = [read_run(run) for run in write_runs(folder / "log")]
    markdown = compare.report(folder / "report", runs, [("log/x", "<b>empty</b>")])
    return folder / "report", markdown


class Outline(HTMLParser):
    """What a page has, in order: headings, tables, pictures, folds, and the text of paragraphs and cells."""

    def __init__(self, text):
        super().__init__()
        self.seen = []
        self.sources = []
        self.open = []
        self.feed(text)
        assert not self.open, "tags that are never closed"

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.sources += [attributes[name] for name in ("src", "href") if name in attributes]
        if tag in ("img", "table", "details"):
            self.seen.append(tag)
        if tag not in ("img", "meta"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)

    def handle_endtag(self, tag):
        if tag == "details":
            self.seen.append("/details")
        assert self.open.pop() == tag

    def handle_data(self, text):
        if self.open and self.open[-1] in ("h1", "h2", "p", "summary") and text.strip():
            self.seen.append(text.strip())


def test_the_verdict_comes_first_and_the_pairs_are_folded_away(made):
    folder, _ = made
    text = (folder / "index.html").read_text(encoding="utf-8")
    outline = Outline(text)
    seen = [each if len(each) < 20 else each[:20] for each in outline.seen]
    places = [seen.index(each) for each in (
        "Which is better, and", "Of three, gpt2, n_la", "table", "± is half of a 95% i", "img", "details",
        "All pairs, one by on", "/details", "Not comparable with ", "What differs between", "Left out",
    )]  # fmt: skip
    assert places == sorted(places)
    assert seen[places[3] : places[4]].count("table") == 1  # the matrix, between ± and the pictures
    assert seen[places[5] : places[7]].count("table") == 1
    # nothing from elsewhere
    assert len(outline.sources) == outline.seen.count("img") >= 7
    assert all(source.startswith("data:image/png;base64,") for source in outline.sources)
    assert not re.search(r"https?:|@import|url\(|<link", text)
    assert '<meta name="viewport" content="width=device-width' in text
    assert "prefers-color-scheme: dark" in text
    assert "&lt;b&gt;empty&lt;/b&gt;" in text and "<b>" not in text
    assert text.count("half of a 95% interval") == 1


def test_in_markdown_the_pairs_are_folded_away_too(made):
    from markdown_it import MarkdownIt

    folder, markdown = made
    assert (folder / "leaderboard.md").read_text(encoding="utf-8") == markdown
    tokens = [(token.type, token.content.strip()) for token in MarkdownIt().enable("table").parse(markdown)]
    start = tokens.index(("html_block", "<details>\n<summary>All pairs, one by one</summary>"))
    end = tokens.index(("html_block", "</details>"))
    assert [kind for kind, _ in tokens[start:end]].count("table_open") == 1
    names = re.findall(r"!\[.*\]\((.*)\)", markdown)
    assert names and all((folder / name).is_file() for name in names)


def test_figures_are_right_aligned_and_names_left(made):
    folder, _ = made
    body = re.sub(r"<script>.*</script>", "", (folder / "index.html").read_text(encoding="utf-8"), flags=re.S)
    cells = re.findall(r"<(t[dh])( scope=\"col\")?( class=\"number\")?>(?:<strong>)?([^<]*)", body)
    right = {text for _, _, number, text in cells if number}
    left = {text for _, _, number, text in cells if not number}
    assert {"validation loss", "training FLOPs", "1", "1,000"} <= right and {"llama", "architecture"} <= left
    for text in left:
        assert not re.fullmatch(page.NUMBER + r"( ± .*)?", text), text
    assert "font-variant-numeric: tabular-nums" in body


@pytest.mark.parametrize("cell, value", [
    ("1.3213 ± 0.0097", 1.3213), ("1.07e+13", 1.07e13), ("847,488", 847_488), ("-0.0048 ± 0.0200", -0.0048),
    ("+3.33 ± 1.20", 3.33), ("7", 7), ("0.000621", 0.000621), ("4.5e-05", 4.5e-5),
    ("–", None), ("", None), ("gemma", None), ("3rd", None), ("gpt2, n_layer 3", None),
])  # fmt: skip
def test_what_a_cell_is_sorted_by(cell, value):
    found = re.search(page.NUMBER, cell)
    assert (float(found[0].replace(",", "")) if found else None) == value
    script = page.PAGE.template
    assert "const NUMBER = /$number/;" in script  # the page's script has this very pattern
    assert "/" not in page.NUMBER


PROBE = """
<pre id="probe"></pre>
<script>
const table = document.querySelector("table");
const result = {};
result.width = [document.documentElement.scrollWidth, innerWidth];
const frame = table.parentNode;
result.table = [table.offsetWidth > frame.clientWidth, getComputedStyle(frame).overflowX];
result.page = getComputedStyle(document.body).backgroundColor;
result.card = getComputedStyle(document.querySelector("img")).backgroundColor;
const heads = [...table.tHead.rows[0].cells];
result.clicks = {};
for (const [name, times] of [["validation loss", 1], ["validation loss", 1], ["rank", 1], ["rank", 1],
                             ["architecture", 1], ["training FLOPs", 1]]) {
  const head = heads.find(each => each.textContent === name);
  const button = head.querySelector("button");
  button.focus();
  button.click();
  const column = [...table.tBodies[0].rows].map(row => row.cells[head.cellIndex].textContent);
  const sorted = heads.filter(each => each.hasAttribute("aria-sort")).map(each => each.textContent);
  (result.clicks[name] ||= []).push([head.getAttribute("aria-sort"), sorted.length, column,
                                     document.activeElement === button]);
}
document.getElementById("probe").textContent = JSON.stringify(result);
</script>
"""


@pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome on this machine")
def test_in_a_browser_on_a_telephone_at_night(made, tmp_path):
    folder, _ = made
    text = (folder / "index.html").read_text(encoding="utf-8")
    (tmp_path / "probe.html").write_text(text.replace("</body>", PROBE + "</body>"), encoding="utf-8")
    command = [
        BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=400,800",
        f"--user-data-dir={tmp_path / 'profile'}", "--blink-settings=preferredColorScheme=0",
        "--virtual-time-budget=2000", "--dump-dom", (tmp_path / "probe.html").as_uri(),
    ]  # fmt: skip
    process = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=120, check=True)
    (probe,) = re.findall(r'<pre id="probe">(.*?)</pre>', process.stdout, re.DOTALL)
    assert probe, process.stderr[-2000:]
    result = json.loads(html.unescape(probe))
    width, window = result["width"]
    assert width <= window <= 500, "the page is wider than the window"
    assert result["table"] == [True, "auto"]  # the table is wider than its frame, which scrolls
    assert max(map(int, re.findall(r"\d+", result["page"]))) < 64, "not dark"
    assert result["card"] == "rgb(255, 255, 255)"
    clicks = result["clicks"]
    for name, answers in clicks.items():
        for number, (direction, sorted_columns, _, focused) in enumerate(answers):
            assert direction == ("descending" if number else "ascending"), name
            assert sorted_columns == 1 and focused, "it is a button, for the keyboard too"
    (_, _, up, _), (_, _, down, _) = clicks["validation loss"]
    losses = [float(cell.split()[0]) for cell in up]
    assert len(losses) == 4 and losses == sorted(losses) and down == up[::-1]
    assert [column for _, _, column, _ in clicks["rank"]] == [["1", "2", "3", "–"], ["3", "2", "1", "–"]]
    ((_, _, names, _),) = clicks["architecture"]
    models = [name.split(", max_lr")[0] for name in names[:3]]
    assert models == ["gpt2, n_layer 3", "gpt2, n_layer 12", "llama"]
    assert len(names) == 4 and names[3].startswith("mta")
    ((_, _, flops, _),) = clicks["training FLOPs"]
    assert [float(cell) for cell in flops] == sorted(map(float, flops))


# ---- pictures


@pytest.fixture
def figures(monkeypatch):
    """The figures that are drawn, instead of their files."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    drawn = {}
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **options: drawn.update({path.name: self}))
    return drawn


def read(*folders):
    return compare.pool_runs([read_run(folder) for folder in folders])


def test_curves_begin_where_they_differ_and_have_bands_over_seeds(tmp_path, figures):
    folders = []
    for seed, last in enumerate((2.0, 2.1, 2.2)):
        folders.append(write_run(tmp_path / f"a{seed}", losses=(5.5, 2.5, last), seed=seed))
    folders.append(write_run(tmp_path / "b", losses=(5.5, 2.4, 1.9), script="train_llama"))
    pools = read(*folders)
    pictures.draw(tmp_path, pools, [("cloze", "nanogpt")])
    axis = figures["loss_tokens.png"].axes[0]
    low, high = axis.get_ylim()
    assert low > 1.5 and high < 3.0  # 5.5, where all begin, is not in it
    assert {text.get_text() for text in axis.texts} == {"gpt2", "llama"}
    (band,) = axis.collections  # one seed has none
    heights = band.get_paths()[0].vertices[:, 1]
    half = 4.30265 * 0.1 / 3**0.5  # t of 2 degrees of freedom
    assert heights.max() == pytest.approx(2.5, abs=1e-6)
    assert heights.min() == pytest.approx(2.1 - half, rel=1e-4)
    # the accuracy's band is that of the table, at the last step too
    axis = figures["cloze_nanogpt.png"].axes[0]
    pool = next(pool for pool in pools if pool.name == "gpt2")
    mean, half = pool.accuracy(("cloze", "nanogpt"))
    edges = [path.vertices[:, 1].max() for band in axis.collections for path in band.get_paths()]
    assert max(edges) == pytest.approx(100 * (mean + half), rel=1e-3)
    assert not any("standard error" in figure.axes[0].get_title() for figure in figures.values())


def test_an_inset_shows_all_runs_or_there_is_none(tmp_path, figures):
    falling = [(x, 3 - 0.9 * min(x, 4) / 4 - 0.001 * x, 0.0) for x in range(1, 21)]
    lower = [(x, y - 0.05, h) for x, y, h in falling]

    def insets(name, **curves):
        pictures.draw_curves(tmp_path / name, "", "", "", curves, inset=True)
        return figures[name].axes[0].child_axes

    (zoom,) = insets("both.png", a=falling, b=lower)
    assert len(zoom.lines) == 2
    assert insets("short.png", a=falling, b=lower[:10]) == []  # b has no last part
    high = [(x, 3.0, 0.0) for x in range(1, 21)]
    assert insets("hidden.png", a=falling, b=high) == []  # it would lie on b


def test_bars_end_at_a_hundred(tmp_path, figures):
    perfect = write_run(tmp_path / "a", right=399)
    poor = write_run(tmp_path / "b", right=1, script="train_llama")
    pictures.draw_bars(tmp_path / "bars.png", "t", read(perfect, poor), ("cloze", "nanogpt"))
    axis = figures["bars.png"].axes[0]
    assert axis.get_xlim()[1] <= 100
    ends = [end for lines in axis.collections for segment in lines.get_segments() for end in segment[:, 0]]
    assert len(ends) == 4 and 0 <= min(ends) and max(ends) <= 100


def test_a_curve_that_ends_above_the_picture_keeps_its_name(tmp_path, figures):
    long = [(x, 2.0 + 3.0 / x, 0.0) for x in range(1, 31)]
    pictures.draw_curves(tmp_path / "a.png", "", "", "", {"long": long, "short": [(1, 9.0, 0.0)]})
    axis = figures["a.png"].axes[0]
    notes = {note.get_text(): note for note in axis.texts}
    assert axis.get_ylim()[1] >= 9.0 or notes["short"].xy[1] == axis.get_ylim()[1]
    assert notes["short"].get_annotation_clip() is False


def test_the_series_are_named_by_what_differs(tmp_path, figures):
    folders = [
        write_run(tmp_path / "x", script="train_llama", n_head=12, n_kv_head=12),
        write_run(tmp_path / "y", script="train_llama", n_head=12, n_kv_head=3),
    ]
    pictures.draw(tmp_path, read(*folders), [])
    names = {text.get_text() for text in figures["loss_tokens.png"].axes[0].texts}
    assert names == {"llama, n_kv_head 12", "llama, n_kv_head 3"}


def test_the_page_is_what_the_program_writes(tmp_path, monkeypatch, capsys):
    run = write_run(tmp_path / "a")
    monkeypatch.setattr(sys, "argv", ["compare", str(run), "--out", str(tmp_path / "report")])
    monkeypatch.setattr(compare, "draw", lambda *given: [])
    compare.main()
    said = capsys.readouterr().out
    assert "details" not in said and said.endswith(f"the page: {tmp_path}/report/index.html\n")
    Outline((tmp_path / "report/index.html").read_text(encoding="utf-8"))
