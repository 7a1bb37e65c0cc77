"README.md from nbs/index.ipynb: `python -m tests.readme` prints it"
import re, sys
from nbconvert import MarkdownExporter
from nbconvert.preprocessors import TagRemovePreprocessor
import nbformat
from tests.tools import ROOT


def readme():
    "The index notebook as Markdown, without cells that are hidden from the page"
    nb = nbformat.read(ROOT/"nbs"/"index.ipynb", 4)
    nb.cells = [c for c in nb.cells if not re.search(r"^#\|\s*hide\s*$", c.source, re.M)]
    for c in nb.cells: c.source = re.sub(r"^#\|.*\n", "", c.source, flags=re.M)
    body, _ = MarkdownExporter().from_notebook_node(nb)
    return "<!-- Made from nbs/index.ipynb by `make readme`. -->\n\n"+body.strip()+"\n"


if __name__=="__main__": sys.stdout.write(readme())
