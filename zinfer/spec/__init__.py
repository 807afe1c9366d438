"""What a model is: its shapes, options and the program of ops.  In: config.json.  Out: a ModelSpec.  No torch."""
