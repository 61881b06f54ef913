"""Models, clusters, networks and devices that tests share."""
