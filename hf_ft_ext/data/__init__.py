"""Data: tasks, loading, tokenising, the demo."""
