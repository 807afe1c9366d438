"""Measure an engine as a user sees it.  In: an LLM, a load.  Out: the field's result block, and a picture."""
