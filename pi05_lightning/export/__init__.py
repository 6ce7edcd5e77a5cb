"""A policy as graphs that other engines run, with a runner that needs neither this package nor its model's code."""
