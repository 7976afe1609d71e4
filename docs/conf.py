"""How Sphinx builds these pages: `make docs`. Nothing is fetched from the network, neither here nor by the pages."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "docs" / "_extensions")]

from ccella_fast import __version__  # noqa: E402

project = "ccella_fast"
version = release = __version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinxarg.ext",
    "configuration_keys",
    "deepspeed_keys",
    "docstrings",
    "mathml",
]

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

default_role = "literal"  # docstrings mark code with single backticks
highlight_language = "none"  # of blocks that name no language: formulas and commands
smartquotes = False  # would turn the dashes of --option into one
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
napoleon_use_ivar = True  # the attributes of a class as one list
add_module_names = False

nitpicky = True
# Signatures name classes of other packages and private ones, which have no page. Pages refer to ours as py:obj or py:func.
nitpick_ignore_regex = [("py:class", r".*")]

html_theme = "furo"
html_title = f"{project} {release}"
html_static_path = ["_static"]
html_css_files = ["pages.css"]
html_math_renderer = "mathml"
html_copy_source = False
html_show_copyright = False
