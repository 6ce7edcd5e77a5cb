"""Where weights come from and go to."""
