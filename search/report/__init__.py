"""The report of one sweep, or of several on the same images: one page that needs nothing else."""
