"""The report of tools.compare as one HTML page, without anything outside it."""
import base64
import string

PAGE = string.Template("""<!doctype html>
<meta charset="utf-8">
<title>NanoTitan report</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70em; margin: 2em auto; padding: 0 1em }
table { border-collapse: collapse; margin: 1em 0; font-size: 13px }
td, th { border: 1px solid #bbb; padding: .25em .6em; text-align: right }
td:nth-child(2), th { text-align: left }
img { max-width: 100%; margin: 1em 0 }
</style>
$body
""")


def make_page(markdown, folder, pictures):
    """The report as one HTML page that holds its pictures, files in the folder."""
    from markdown_it import MarkdownIt

    body = MarkdownIt("commonmark", {"html": False}).enable("table").render(markdown)
    for file in pictures:
        encoded = base64.b64encode((folder / file).read_bytes()).decode()
        body = body.replace(f'src="{file}"', f'src="data:image/png;base64,{encoded}"')
    return PAGE.substitute(body=body)
