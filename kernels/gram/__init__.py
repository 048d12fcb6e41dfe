"""Sum of the outer products of masked rows with themselves."""
