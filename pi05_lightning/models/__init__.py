"""Pure PyTorch: the backbone and its heads."""
