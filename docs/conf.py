import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Document the source in this repository, even if another version is installed.
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
    "sphinx_copybutton",
    "sphinx_gallery.gen_gallery",
]
templates_path = ["_templates"]
exclude_patterns = ["_build"]
# Single backticks are names: links where a page exists, otherwise code.
default_role = "py:obj"

autosummary_generate = True
# The docstrings contain the types.
autodoc_typehints = "none"
# What the button copies can be pasted and run: code without prompts and output.
copybutton_prompt_text = r">>> |\.\.\. "
copybutton_prompt_is_regexp = True
# The template of a class page lists the members (see _templates).
numpydoc_show_class_members = False

sphinx_gallery_conf = {
    "examples_dirs": "../examples",
    "gallery_dirs": "auto_examples",
    "filename_pattern": r"[/\\]plot_",
    "ignore_pattern": r"(^|[/\\])(train_\w+|flowers|serve_\w+)\.py$|benchmarks",
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
html_sidebars = {"development": [], "related": [], "changelog": []}
html_copy_source = False
html_show_sourcelink = False
