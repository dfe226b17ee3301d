"""One device's local training, and central training of the public base."""
