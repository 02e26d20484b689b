"""The coordinator: registry, scheduler, storage, clustering and the services over them."""
