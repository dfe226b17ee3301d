"""What a run gives away: adapter folders and model cards, each with the guarantee that it carries."""
