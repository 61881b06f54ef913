"""Models, clusters, networks and devices for tests."""
