"""Reconstruction quality of one or more VAEs over a source of photos, by a recipe that others can repeat."""
