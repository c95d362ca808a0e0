"""What training saves: models and adapters, checkpoints, and small files of what changed."""
