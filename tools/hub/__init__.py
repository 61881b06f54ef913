"""Model downloads: catalog, sources, HTTP."""
