"""The gRPC services: thin, typed, over the store and the object store."""
