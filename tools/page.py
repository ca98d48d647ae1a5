"""
The report of tools.compare as Markdown and as one HTML page.

A report is a list of parts: Markdown paragraphs, and Folded ones. The page holds its pictures and all else
that it needs, so that it opens from a disk without a network.
"""
import base64
import dataclasses
import html
import string

# a cell's leading number, as in "1.3213 ± 0.0097", "1.07e+13", "847,488" or "+3.33 ± 1.2"; the same in
# Python and in JavaScript
NUMBER = r"^[+-]?[0-9][0-9,]*(?:\.[0-9]+)?(?:e[+-]?[0-9]+)?(?![0-9A-Za-z])"

PAGE = string.Template("""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>NanoTitan report</title>
<style>
:root { --text: #1c1c1c; --page: #fff; --line: #ccc; --head: #f2f2f2; --accent: #0057a3 }
@media (prefers-color-scheme: dark) {
  :root { --text: #e4e4e4; --page: #16181b; --line: #444a52; --head: #24282d; --accent: #7dbbf5 }
}
* { box-sizing: border-box }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--text); background: var(--page);
       max-width: 75em; margin: 0 auto; padding: 1em; overflow-wrap: anywhere }
h1 { font-size: 1.6em; line-height: 1.25 }
h1 + p { font-size: 1.15em; max-width: 45em }
p { max-width: 50em }
code { font-size: .9em }
.scroll { overflow-x: auto; margin: 1em 0; border: 1px solid var(--line); border-radius: 4px }
table { border-collapse: collapse; font-size: 14px; width: 100%; overflow-wrap: normal }
th, td { padding: .3em .7em; border-bottom: 1px solid var(--line); text-align: left; vertical-align: baseline;
         font-variant-numeric: tabular-nums }
td { white-space: nowrap }
td.wrap { white-space: normal; min-width: 14em }
@media (max-width: 45em) { td { white-space: normal } td.number { white-space: nowrap } }
tbody tr:last-child td { border-bottom: 0 }
th { background: var(--head); vertical-align: bottom; font-weight: 600 }
th.number, td.number { text-align: right }
th button { font: inherit; color: inherit; text-align: inherit; background: none; border: 0; padding: 0;
            cursor: pointer; width: 100% }
th button:hover { color: var(--accent) }
th button::after { content: " \\2195"; opacity: .45 }
th[aria-sort] button::after { opacity: 1 }
th[aria-sort=ascending] button::after { content: " \\2191" }
th[aria-sort=descending] button::after { content: " \\2193" }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px }
img { display: block; width: 100%; max-width: 52em; height: auto; background: #fff; padding: .5em;
      border: 1px solid var(--line); border-radius: 6px }
@media (min-width: 70em) {
  p:has(> img) { display: inline-block; vertical-align: top; width: calc(50% - .8em); max-width: none;
                 margin: 0 .4em .4em 0 }
}
summary { cursor: pointer; font-weight: 600 }
details { margin: 1em 0 }
</style>
<body>
<main>
$body</main>
<script>
const NUMBER = /$number/;

function value(cell) {  // a number, a text, or null where there is nothing
  const text = cell.textContent.trim();
  if (text === "" || text === "–") return null;
  const found = text.match(NUMBER);
  return found ? Number(found[0].replaceAll(",", "")) : text;
}

function compare(a, b) {
  if (typeof a === "number" && typeof b === "number") return a - b;
  return String(a).localeCompare(String(b), "en", {numeric: true});
}

function sort(head) {
  const table = head.closest("table");
  const column = head.cellIndex;
  const up = head.getAttribute("aria-sort") !== "ascending";
  for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", up ? "ascending" : "descending");
  const body = table.tBodies[0];
  const rows = [...body.rows].map(row => [value(row.cells[column]), row]);
  rows.sort(([a], [b]) => {
    if (a === null || b === null) return (a === null) - (b === null);  // last, whichever way
    return up ? compare(a, b) : compare(b, a);
  });
  for (const [, row] of rows) body.append(row);
}

for (const head of document.querySelectorAll("thead th")) {
  const button = document.createElement("button");
  button.append(...head.childNodes);
  button.title = "sort by this column";
  button.addEventListener("click", () => sort(head));
  head.append(button);
}
</script>
</body>
</html>
""")


@dataclasses.dataclass
class Folded:
    """Paragraphs behind a line that opens them."""

    summary: str
    parts: list


def table(head, rows, align=None):
    """A Markdown table: its header and rows as lists of str; align: "---" or "--:" for each column."""
    text = ""
    for cells in (head, align or ["---"] * len(head), *rows):
        text += "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"
    return text


def as_markdown(parts):
    """A report as Markdown; GitHub shows <details> as folded."""
    blocks = []
    for part in parts:
        if isinstance(part, Folded):
            blocks.append(f"<details>\n<summary>{html.escape(part.summary)}</summary>")
            blocks.append(as_markdown(part.parts).rstrip("\n"))
            blocks.append("</details>")
        else:
            blocks.append(part.rstrip("\n"))
    return "\n\n".join(blocks) + "\n"


def open_table(renderer, tokens, index, options, env):
    """A table that is too wide scrolls within itself, by keyboard, too."""
    return '<div class="scroll" tabindex="0" role="region" aria-label="table"><table>\n'


def close_table(renderer, tokens, index, options, env):
    return "</table></div>\n"


def open_cell(renderer, tokens, index, options, env):
    """A cell with its column's alignment as a class."""
    token = tokens[index]
    classes = []
    if "right" in (token.attrGet("style") or ""):
        classes.append("number")
    if token.tag == "td" and len(tokens[index + 1].content) > 60:
        classes.append("wrap")
    start = f"<{token.tag}" + (' scope="col"' if token.tag == "th" else "")
    return start + (f' class="{" ".join(classes)}">' if classes else ">")


def markdown_renderer():
    from markdown_it import MarkdownIt

    markdown = MarkdownIt("commonmark", {"html": False}).enable("table")
    markdown.add_render_rule("table_open", open_table)
    markdown.add_render_rule("table_close", close_table)
    markdown.add_render_rule("th_open", open_cell)
    markdown.add_render_rule("td_open", open_cell)
    return markdown


def as_body(parts):
    """A report's parts as HTML."""
    markdown = markdown_renderer()
    text = ""
    for part in parts:
        if isinstance(part, Folded):
            text += f"<details>\n<summary>{html.escape(part.summary)}</summary>\n"
            text += as_body(part.parts) + "</details>\n"
        else:
            text += markdown.render(part)
    return text


def as_html(parts, folder, pictures):
    """A report as one HTML page that holds its pictures, files in the folder."""
    body = as_body(parts)
    for file in pictures:
        encoded = base64.b64encode((folder / file).read_bytes()).decode()
        body = body.replace(f'src="{file}"', f'src="data:image/png;base64,{encoded}"')
    return PAGE.substitute(body=body, number=NUMBER)
