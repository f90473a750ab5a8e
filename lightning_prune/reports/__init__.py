"""Run records as tables and pictures."""
