"""What a user types: one file per command, and what several of them share."""
