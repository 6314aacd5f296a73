"""Shapes in signatures are checked while the tests run; users pay nothing for them."""

from jaxtyping import install_import_hook

install_import_hook("esolm", "beartype.beartype")  # before any test imports the package
