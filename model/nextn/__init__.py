"""Programs and costs of heads for multi-token prediction (MTP), which are in layers after all others."""
