"""What the recipes share: a protocol or a grid as a value, its command line, the comparison, and its findings."""
