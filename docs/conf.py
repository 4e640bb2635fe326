"""Sphinx configuration. Build with ``python -m sphinx -W -b html docs docs/_build/html``."""

import re
from pathlib import Path

project = "stablekl"
author = "the stablekl authors"
copyright = "the stablekl authors"
version = release = re.findall(
    r'^version = "(.+)"', (Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8"), re.M
)[0]

extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax"]
exclude_patterns = ["_build"]
default_role = "py:obj"  # a link where there is something to link to, else code

html_theme = "alabaster"
html_theme_options = {
    "description": "KL divergences that stay finite, non-negative and right",
    "page_width": "1000px",
}

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
