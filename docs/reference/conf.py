"""Sphinx's settings: the site that `make docs` builds of the repository's pages and of the docstrings."""

from __future__ import annotations

import dataclasses
import inspect
import re
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util import logging
from sphinx.util.inspect import stringify_signature

import veneer

project = "Veneer"
version = release = veneer.__version__
html_title = f"Veneer {version}"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
root_doc = "docs/index"
include_patterns = ["*.md", "benchmarks/RESULTS.md", "benchmarks/peer_suite/README.md", "docs/**"]
exclude_patterns = [".venv*", "build", "demo"]
myst_heading_anchors = 4

autodoc_default_options = {"members": True}
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
maximum_signature_line_length = 88
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False

html_theme = "furo"
html_copy_source = html_show_copyright = False
html_extra_path = ["start"]  # leads from the site's root to its first page
pygments_style, pygments_dark_style = "friendly", "github-dark"

# The table of contents stays out of docs/index.md, which is read on its own too: its links say which pages there are.
_CONTENTS = """
```{toctree}
:hidden:
:caption: Guide

%s
```

```{toctree}
:hidden:
:caption: Reference

reference/index
```

```{toctree}
:hidden:
:caption: Project
:glob:

../README*
../CONTRIBUTING
../CHANGELOG
../benchmarks/RESULTS
../benchmarks/peer_suite/README
example-report/report
```
"""
_log = logging.getLogger(__name__)


def _add_contents(app: Sphinx, page: str, source: list[str]) -> None:
    if page == root_doc:
        source[0] += _CONTENTS % "\n".join(dict.fromkeys(re.findall(r"\]\(([\w-]+)\.md", source[0])))


def _prepare_docstring(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Report a name without a docstring, and word for napoleon what it would read otherwise."""
    if not any(lines):
        _log.warning("%s has no docstring", name)
    text = re.sub(
        r"^Args, beside those of (.*):$", r"Beside the arguments of \1:\n\nArgs:", "\n".join(lines), flags=re.M
    )
    text = re.sub(r"^( +)(\w+Error: .*?\.) (?=\w+Error: )", r"\1\2\n\1", text, flags=re.M)  # an error a line
    if what == "property":
        text = f"\\\n{text}"  # an escaped line break: before a colon in its first line napoleon expects a type
    lines[:] = text.split("\n")


def _signature_of_fields(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, signature: str | None, returned: str | None
) -> tuple[str, None] | None:
    """Show the fields of a dataclass, which its constructor passes on as ``**values``."""
    if what != "class" or not dataclasses.is_dataclass(obj):
        return None
    own = inspect.signature(obj.__init__)
    shown = [parameter for key, parameter in own.parameters.items() if key != "self"]
    return stringify_signature(
        own.replace(parameters=shown, return_annotation=own.empty), unqualified_typehints=True
    ), None


def _check_member(app: Sphinx, what: str, name: str, obj: Any, skip: bool, options: Any) -> None:
    """Report a public method without a docstring, which autodoc leaves out without a word."""
    if what == "class" and not name.startswith("_") and callable(obj) and not inspect.getdoc(obj):
        _log.warning("the member %s has no docstring", name)


def _find_public_name(app: Sphinx, env: Any, node: nodes.Element, text: nodes.Element) -> nodes.Element | None:
    """Lead a reference to the module of a public name to the name itself; leave one to an internal name as text."""
    if node.get("refdomain") != "py":
        return None
    domain, last = env.get_domain("py"), node["reftarget"].rpartition(".")[2]
    for target in (f"veneer.{last}", f"veneer.extending.{last}"):
        if target in domain.objects:
            return domain.resolve_xref(env, node["refdoc"], app.builder, "obj", target, node, text)
    return text


def setup(app: Sphinx) -> None:
    """Connect what the settings cannot say."""
    app.connect("source-read", _add_contents)
    app.connect("autodoc-process-docstring", _prepare_docstring, priority=400)  # before napoleon
    app.connect("autodoc-process-signature", _signature_of_fields)
    app.connect("autodoc-skip-member", _check_member)
    app.connect("missing-reference", _find_public_name)
