"""Everything that changes encoder weights, and what is done with the result."""
