"""A run on one page: what its directory holds, drawn and set."""
