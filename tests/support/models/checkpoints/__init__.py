"""Parts of small models: their shapes, and tensors of their own kinds of layers."""
