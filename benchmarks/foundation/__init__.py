"""The targets of the foundation: loop, start, loading, beside the diffusers script."""
