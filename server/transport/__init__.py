"""Messages between server and nodes: exchanges that hand out work and collect replies and sums."""
