"""The embedded model `EVA01-CLIP-nano`: its configuration, weights and card."""
