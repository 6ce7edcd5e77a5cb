"""What a model costs: FLOPs and bytes counted, memory tracked, seconds measured."""
