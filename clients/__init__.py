"""The device side: the Flower ClientApp and the host of a node's devices."""
