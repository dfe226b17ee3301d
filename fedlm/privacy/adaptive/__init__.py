"""What follows from earlier releases: the clip norm, the noise allocation over kinds of blocks, the chosen rows."""
