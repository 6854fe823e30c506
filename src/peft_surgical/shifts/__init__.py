"""The shifts that the paper measures: its datasets as they are published, cut into source and target."""
