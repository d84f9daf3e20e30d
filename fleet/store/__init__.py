"""Where bytes live: the artifact store we write, and the folders we read.

`open_store(uri)` gives a `Store` (a local folder or an S3 prefix) for artifacts and records.
`open_folder(uri)` gives a read-only `Folder`: a model somebody left in a local folder, under
`s3://bucket/prefix`, in `hf://org/name@commit`, or in our own store. `folder_digest(folder)` is the
digest of a whole folder: what a `@sha256:…` pin compares with. Both hold configuration only, so
they pickle into actors. Opening touches no network, unless a pin has to be compared.

boto3 and huggingface_hub are imported when an `s3://` or `hf://` address is first opened.
"""

from fleet.store.base import Folder, Store, StoreWriter
from fleet.store.digest import folder_digest
from fleet.store.open import open_folder, open_store

__all__ = ["Folder", "Store", "StoreWriter", "folder_digest", "open_folder", "open_store"]
