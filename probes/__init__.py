"""Everything that keeps the encoder frozen, and all that both trainers share. Importing it loads no torch."""
