"""What a run is about to do (`plan`), what it costs (`resources`), and what it was (`record`, which is `run.json`)."""
