"""What the paper's recipes share: readers of the published datasets, protocols, and the study that runs one."""
