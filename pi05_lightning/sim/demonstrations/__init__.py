"""Scripted experts' demonstrations, with language, of any simulator that has them."""
