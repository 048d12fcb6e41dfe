"""Log-probability of given labels under a linear head."""
