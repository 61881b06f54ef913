"""Programs and costs of heads for multi-token prediction (MTP). They are in layers after all other layers."""
