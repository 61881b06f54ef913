"""What tests share: models, clusters, networks and devices made for them."""
