"""Read the user's own files (csv, tsv, json, jsonl) as data sets."""
