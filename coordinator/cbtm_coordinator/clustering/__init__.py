"""From a corpus to a clustering model and token shards, streaming, in bounded memory."""
