import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# The documentation is that of the source beside it, installed or not.
sys.path.insert(0, str(ROOT))

from skltl import __version__  # noqa: E402

project = "skltl"
author = "The skltl developers"
project_copyright = author
version = release = __version__

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "numpydoc",
    "sphinx_gallery.gen_gallery",
]
templates_path = ["_templates"]
exclude_patterns = ["_build"]
# Single backticks in docstrings are names: links where there is a page, else code.
default_role = "py:obj"

autosummary_generate = True
# Types stand in the docstrings.
autodoc_typehints = "none"
# The page of a class lists its members itself (see _templates).
numpydoc_show_class_members = False

sphinx_gallery_conf = {
    "examples_dirs": "../examples",
    "gallery_dirs": "auto_examples",
    "filename_pattern": r"[/\\]plot_",
    "ignore_pattern": r"(^|[/\\])(train_\w+|flowers)\.py$|benchmarks",
    "download_all_examples": False,
    "write_computation_times": False,
}

html_theme = "pydata_sphinx_theme"
html_title = f"skltl {release}"
html_theme_options = {
    "logo": {"text": "skltl"},
    "navigation_with_keys": False,
    "show_toc_level": 2,
}
html_sidebars = {"development": [], "changelog": []}
html_copy_source = False
html_show_sourcelink = False
