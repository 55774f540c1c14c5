"""The settings of the documentation's site: `make docs` builds it with Sphinx."""

import os
import re
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE / "reference")]

from loda_math import __version__  # noqa: E402

project = "loda"
release = version = __version__
copyright = "the loda developers"  # noqa: A001 - Sphinx's name
html_title = "loda"

extensions = [
    "myst_nb",
    "numpydoc",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "reference_pages",
]
templates_path = ["_templates"]
exclude_patterns = ["records/**", "recipes/**", "_build/**"]
suppress_warnings = ["mystnb.unknown_mime_type"]

myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 4
nb_execution_mode = "auto"
nb_execution_timeout = 300
nb_execution_raise_on_error = True
nb_merge_streams = True

autodoc_typehints = "none"  # numpydoc's sections have the types
numpydoc_show_class_members = False
numpydoc_class_members_toctree = False

html_math_renderer = "mathml"  # needs neither a script nor a network
toc_object_entries_show_parents = "hide"
html_theme = "pydata_sphinx_theme"
html_static_path = ["_static"]
html_extra_path = ["../build/reports"]  # written by reference_pages
html_css_files = ["site.css"]
html_theme_options = {
    "show_toc_level": 2,
    "navigation_with_keys": False,
    "show_prev_next": False,
    "secondary_sidebar_items": ["page-toc"],
    "header_links_before_dropdown": 6,
    "footer_start": ["copyright"],
    "footer_end": [],
}
html_sidebars = {"index": []}
html_show_sourcelink = False
# Examples are copied without their prompts and outputs.
copybutton_prompt_text = r">>> |\.\.\. "
copybutton_prompt_is_regexp = True


def setup(app):
    """Let docutils write formulas as MathML, and notebooks find the packages of the checkout."""
    from docutils import nodes
    from docutils.utils.math.latex2mathml import tex2mathml

    places = [str(HERE.parent), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, places))

    def mathml(formula, **how):
        written = tex2mathml(formula.replace(r"\dots", r"\ldots"), **how)
        # An index of a barred letter belongs beside it; docutils sets it beneath.
        under = r"<munderover>(\s*<mi>\w</mi>)(.*?)(<mo[^>]*>ˉ</mo>)\s*</munderover>"
        return re.sub(under, r"<msub><mover>\1\3</mover>\2</msub>", written, flags=re.DOTALL)

    def inline(writer, node):
        writer.body.append(mathml(node.astext()))
        raise nodes.SkipNode

    def block(writer, node):
        writer.body.append(f"<p>{mathml(node.astext(), as_block=True)}</p>")
        raise nodes.SkipNode

    app.add_html_math_renderer("mathml", (inline, None), (block, None))
