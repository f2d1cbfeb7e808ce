"""Sphinx: the pages beside this file and the reference from docstrings. No network; ``-W`` makes warnings errors."""

from sparsekit import __version__

project, author = "sparsekit", "the sparsekit authors"
version = release = __version__
extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "alabaster"
html_theme_options = {"description": "Pruned networks that run faster", "page_width": "1100px"}
html_copy_source = html_show_sourcelink = False
autodoc_typehints = "none"  # docstrings say shapes and dtypes, which types do not
autodoc_member_order = "bysource"
default_role = "code"
nitpicky = False
