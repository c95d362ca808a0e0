"""Files that people write themselves (csv, tsv, json, jsonl) as data sets."""
