"""Whether settings, student and teacher fit each other, and how their classes correspond."""
