"""The paper's table on a real small model: every stage of the recipe trained, and measured after each."""
