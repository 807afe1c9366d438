"""Models.  In: a ModelSpec.  Out: a composition of layers.  A family is data."""
