"""What has shifted between a network's source and the images of a new place, and what that suggests to tune."""
