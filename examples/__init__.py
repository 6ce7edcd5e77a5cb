"""Programs to start from, each with a page in docs/."""
