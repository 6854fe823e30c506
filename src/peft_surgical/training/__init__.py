"""Who is trained when and how fast, with which penalty; one run of a method, and searches among many."""
