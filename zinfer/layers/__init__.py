"""Layers.  In: activations and weight views.  Out: activations.  They know no tiers."""
