"""Programs and costs of heads for multi-token prediction (MTP). Their layers come after all other layers."""
