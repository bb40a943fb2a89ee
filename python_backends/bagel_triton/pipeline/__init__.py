"""The order of the stages, and what happens when one fails."""
