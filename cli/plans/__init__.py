"""`llamaclust plan`: plans of clusters and of assumed machines."""
