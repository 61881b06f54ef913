"""Small models, checkpoints and vocabularies made for tests."""
