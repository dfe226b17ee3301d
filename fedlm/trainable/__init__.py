"""What trains in a model, as named blocks of one flat update vector."""
