"""A vision model's image encoder, which a worker loads in addition to a stage."""
