"""What runs have left, as tables, figures and pages."""
