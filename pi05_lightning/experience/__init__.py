"""Learning from a policy's own attempts: how good they are, and which of its actions were better than expected."""
