"""One runner for all cases: options, turns, tables, and the clusters and models that cases share."""
