"""Shapes in signatures are checked at run time while the tests run; production pays nothing for them."""

from jaxtyping import install_import_hook

install_import_hook("esolm", "beartype.beartype")
