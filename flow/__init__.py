"""Video files to displacement fields to shards. Nothing here imports another package of this project."""
