"""What a cluster says of itself, and how its operators direct it."""
