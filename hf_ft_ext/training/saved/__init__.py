"""What training saves: models and adapters, checkpoints, and deltas (small files of changed weights)."""
