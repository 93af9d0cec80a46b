"""One script a table; results lie beside them (see README.md)."""
