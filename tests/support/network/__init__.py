"""Virtual networks: namespaces, links, delays."""
