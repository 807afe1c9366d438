"""Several devices that serve one model, in one process."""
