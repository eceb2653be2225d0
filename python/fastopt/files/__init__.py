"""Files: safetensors containers, shards, sources and atomic writing."""
