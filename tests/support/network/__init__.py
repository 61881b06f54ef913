"""A network in a box: namespaces, cables, delays."""
