"""KV cache.  In: rows of keys and values.  Out: a view of what each sequence may see."""
