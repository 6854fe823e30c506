"""The frozen part of a network before its first tuned tensor: cut off, computed once for each image, and replayed."""
