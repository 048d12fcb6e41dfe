"""Whole runs: sessions, flags, checkpoints, caches, reports. Top of the library."""
