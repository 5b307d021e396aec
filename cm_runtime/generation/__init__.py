"""Generation of many images: streams, jobs of shards, Ray."""
