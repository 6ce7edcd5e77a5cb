"""Files as this package reads and writes them: whole or not at all, local or from the Hub, shipped with it."""
