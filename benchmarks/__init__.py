"""What `make bench` runs: π0.5 here against LeRobot's, on the same work, with the same weights and the same outputs."""
