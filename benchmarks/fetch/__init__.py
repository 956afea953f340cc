"""Real models and texts, fetched by script into a cache folder and checked; none is kept in the repository."""
