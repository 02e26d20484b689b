"""What coordinator, worker and client share: errors, rpc, byte transfer, recipe, shards, routing."""
