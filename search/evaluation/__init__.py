"""The locked test images: scores, intervals, tables, and a log of every look."""
