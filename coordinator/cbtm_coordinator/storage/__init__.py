"""Object storage: signed URLs, two backends, and the check on what landed.

`open_object_store(StorageConfig(...))` gives an `ObjectStore` (see `base` for the protocol). `prepare_upload`,
`finish_upload`, `prepare_download`, `discard` and `verify` are what services call;
`cbtm_coordinator.storage.http_app.make_app(local_store)` is the endpoint of the local backend. boto3 and starlette are
imported only by those who need them.
"""

from cbtm_coordinator.storage.base import (
    PART_SIZE,
    ListedObject,
    ObjectStat,
    ObjectStore,
    OpenUpload,
    Part,
    Signed,
    check_key,
)
from cbtm_coordinator.storage.local import LocalStore
from cbtm_coordinator.storage.open import StorageConfig, open_object_store
from cbtm_coordinator.storage.s3 import S3Config, S3Store
from cbtm_coordinator.storage.signing import UrlSigner, load_or_create_key
from cbtm_coordinator.storage.uploads import discard, finish_upload, prepare_download, prepare_upload
from cbtm_coordinator.storage.verify import verify

__all__ = [
    "PART_SIZE",
    "ListedObject",
    "LocalStore",
    "ObjectStat",
    "ObjectStore",
    "OpenUpload",
    "Part",
    "S3Config",
    "S3Store",
    "Signed",
    "StorageConfig",
    "UrlSigner",
    "check_key",
    "discard",
    "finish_upload",
    "load_or_create_key",
    "open_object_store",
    "prepare_download",
    "prepare_upload",
    "verify",
]
