"""The site of these pages, built by `make docs`: pages in Markdown, a reference from docstrings, help from the parser.

Nothing in a built page is fetched from elsewhere: no web fonts, no scripts of others, no formulas set by a service.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # from_code

from esolm import __version__

project = "esolm"
author = "The esolm authors"
copyright = "the esolm authors"
version = release = __version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "from_code"]  # myst_nb reads pages in Markdown too
nb_execution_mode = "off"  # a notebook is shown as it was committed; `make notebook` executes it
nb_ipywidgets_js = {}  # nothing from elsewhere
myst_heading_anchors = 3  # links to headings, as on the pages of a repository
highlight_language = "none"  # a drawing is no program

autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
autodoc_class_signature = "mixed"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88
# `-n` makes every name of esolm that leads nowhere an error; names of others, and private ones, have no page
nitpick_ignore_regex = [("py:.*", r"(?!esolm\b).*|.*\._\w+")]

html_theme = "furo"
html_title = "esolm"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sourcelink = False
html_show_sphinx = False
html_theme_options = {"navigation_with_keys": True}
