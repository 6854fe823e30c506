"""What the recipes share: a published protocol as a value, the source step, the comparison, and its findings."""
