"""Measurements: what things cost, beside a plain reference in the same run."""
