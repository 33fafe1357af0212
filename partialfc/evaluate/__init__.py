"""Open-set verification, closed-set identification, and their figures."""
